export { answer } from './src/answer.js';
