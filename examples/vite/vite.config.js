// Relative addresses, so that what is built works wherever it is put.
export default { base: './', worker: { format: 'es' } };
