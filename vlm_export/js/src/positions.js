/**
 * Places of tokens in three axes: time, line and column, which are one number for a text. An image's tokens share a
 * time; the text after it goes on behind the longer side of its grid. `runtime/positions.py` does the same.
 */

/**
 * @param {boolean[]} is_image for each token of one prompt
 * @param {number[][]} grids lines and columns of cells of each image
 * @returns {{ places: number[], shift: number }} those of all tokens along one axis, then along the next; and what is
 *     added to the number of a token after the prompt
 * @throws {TypeError} an image's tokens are not as many as its cells, or there is another number of images
 */
export function grid_places(is_image, grids) {
    /** @type {number[][]} */
    const axes = [[], [], []];
    const left = [...grids];
    let start = 0;
    for (let index = 0; index < is_image.length; ) {
        const end = is_image.findIndex((image, place) => place > index && image !== is_image[index]);
        const length = (end === -1 ? is_image.length : end) - index;
        const [lines, columns] = is_image[index] ? (left.shift() ?? [0, 0]) : [1, length];
        if (lines * columns !== length) {
            throw new TypeError(
                `the prompt has ${length} image tokens in a row for an image of ${lines * columns} cells`,
            );
        }
        for (let place = 0; place < length; place++) {
            const [line, column] = [Math.floor(place / columns), place % columns];
            const along = is_image[index] ? [0, line, column] : [place, place, place];
            along.forEach((offset, axis) => axes[axis].push(start + offset));
        }
        start += Math.max(lines, columns);
        index += length;
    }
    if (left.length) {
        throw new TypeError('the prompt has fewer places for images than there are images');
    }
    return { places: axes.flat(), shift: start - is_image.length };
}
