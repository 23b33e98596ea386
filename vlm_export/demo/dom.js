/**
 * The element of the page that a selector finds first.
 *
 * @template {HTMLElement} [Kind=HTMLElement]
 * @param {string} selector
 * @param {new () => Kind} [kind] what it must be
 * @param {ParentNode} [within] where it is looked for
 * @returns {Kind}
 * @throws {Error} it is missing, or of another kind
 */
export function $(selector, kind = /** @type {new () => Kind} */ (HTMLElement), within = document) {
    const found = within.querySelector(selector);
    if (!(found instanceof kind)) {
        throw new Error(`the page has no ${kind.name} ${selector}`);
    }
    return found;
}
