/** Answers what `WorkerModel` of `vlm-export/remote` asks of the worker that this is called in, from now on. */
export function answer(): void;
