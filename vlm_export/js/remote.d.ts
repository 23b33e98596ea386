import type { GenerateOptions, Generated, LoadOptions, VisionLanguageModel } from './index.js';

export type WorkerImage = string | URL | Blob;
export type WorkerLoadOptions = LoadOptions;
/** Of images what can be sent to a worker: files, and addresses, relative to the page. */
export interface WorkerGenerateOptions extends Omit<GenerateOptions, 'image' | 'images' | 'pixel_values'> {
    image?: WorkerImage;
    /** Layout chat. */
    images?: WorkerImage[];
}

/** A model in a worker: the page answers while it generates. */
export class WorkerModel {
    /** Loads a repo in a worker of its own, whose script calls `answer()` of `vlm-export/worker`. */
    static from_pretrained(worker: Worker, id: string, options?: WorkerLoadOptions): Promise<WorkerModel>;
    /** Use `from_pretrained`. */
    private constructor();

    readonly layout: VisionLanguageModel['layout'];
    readonly takes_prompt: boolean;
    readonly prefix_conditioning: boolean;
    readonly generation_config: Record<string, unknown>;
    readonly dtype: VisionLanguageModel['dtype'];
    readonly device: VisionLanguageModel['device'];

    /** As `VisionLanguageModel.generate`. */
    generate(options?: WorkerGenerateOptions): Promise<Generated>;
    /** Frees the model and ends the worker, which alone gives back the runtime's memory. */
    dispose(): Promise<void>;
}
