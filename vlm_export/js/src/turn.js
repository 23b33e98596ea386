/**
 * Lets what waits for its turn have it: a click, a message to a worker, a repaint. On WASM a step of generation awaits
 * nothing but what is done already, so that without this neither `signal` nor a page would hear of anything before the
 * end. A message is not held back as a timer is, which waits 4 ms after some turns.
 *
 * @returns {Promise<void>}
 */
export function turn() {
    return new Promise((resolve) => {
        const { port1, port2 } = new MessageChannel();
        port1.onmessage = () => {
            port1.close();
            resolve();
        };
        port2.postMessage(null);
    });
}
