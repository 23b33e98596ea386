/**
 * What the page asks of a worker, and what that answers.
 *
 * @typedef {import('./worker.js').Request} Request
 */

/** @type {(reply: import('./worker.js').Reply) => void} */
export const reply = (value) => postMessage(value);

/**
 * Does what is asked, in the order in which it comes; what goes wrong is an answer too.
 * @param {(request: Request) => Promise<void>} act
 */
export function serve(act) {
    /** @param {MessageEvent<Request>} event */
    self.onmessage = async ({ data }) => {
        try {
            await act(data);
        } catch (error) {
            const reason = /** @type {Partial<Error> | undefined} */ (error)?.message ?? error;
            reply({ error: String(reason) });
        }
    };
}
