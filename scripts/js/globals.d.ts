/** Of WebGPU, what TypeScript's own declarations lack. */
declare const GPUBufferUsage: { readonly STORAGE: number; readonly COPY_SRC: number; readonly COPY_DST: number };
/** What `vlm_export/browser/drive.mjs` adds to a page. */
interface Window {
    send(answer: object): Promise<void>;
    save(name: string, base64: string): Promise<void>;
}
