export { WorkerModel } from './src/remote.js';
