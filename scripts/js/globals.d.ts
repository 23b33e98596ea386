/** Of WebGPU, what TypeScript's own declarations lack. */
declare const GPUBufferUsage: { readonly STORAGE: number; readonly COPY_SRC: number; readonly COPY_DST: number };
