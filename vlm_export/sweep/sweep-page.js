// Sorts the table by a column, and shows those rows that are asked for.

const table = document.querySelector('table.sortable');
const body = table.tBodies[0];
const rows = [...body.rows];
const asWritten = [...rows];
const headings = [...table.tHead.rows[0].cells];

/** What a row is sorted by in a column: a number, else the text; nothing where nothing is known. */
function key(row, column) {
    const cell = row.cells[column];
    if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
    return cell.classList.contains('number') ? undefined : cell.textContent.trim();
}

/** Whether one row comes behind another, as a number; what is not known comes last in either direction. */
function compare(one, other, column, direction) {
    const [left, right] = [key(one, column), key(other, column)];
    if (left === undefined || right === undefined) return (left === undefined) - (right === undefined);
    return direction * (typeof left === 'number' ? left - right : left.localeCompare(right, 'en', { numeric: true }));
}

/** Rows in the order of a column, or turned round where they are in it already. */
function sort(column) {
    const heading = headings[column];
    const descending = heading.ariaSort === 'ascending';
    for (const each of headings) each.removeAttribute('aria-sort');
    heading.setAttribute('aria-sort', descending ? 'descending' : 'ascending');
    rows.sort((one, other) => compare(one, other, column, descending ? -1 : 1));
    body.append(...rows);
}

const [filter, budget, passing] = ['filter', 'budget', 'passing'].map((id) => document.getElementById(id));

function show() {
    const words = filter.value.toLowerCase().split(/\s+/);
    const most = budget.value === '' ? Number.POSITIVE_INFINITY : Number(budget.value) * 1e6;
    let shown = 0;
    for (const row of rows) {
        const text = row.textContent.toLowerCase();
        const fits = Number(row.dataset.bytes) <= most && (!passing.checked || row.dataset.status === 'pass');
        row.hidden = !(fits && words.every((word) => text.includes(word)));
        shown += row.hidden ? 0 : 1;
    }
    document.getElementById('shown').textContent = `${shown} of ${rows.length}`;
}

const by = document.getElementById('by');

headings.forEach((heading, column) => {
    by.append(new Option(heading.textContent, String(column)));
    const button = document.createElement('button');
    button.type = 'button';
    button.append(...heading.childNodes);
    button.addEventListener('click', () => sort(column));
    heading.append(button);
});
by.addEventListener('change', () => {
    for (const each of headings) each.removeAttribute('aria-sort');
    if (by.value === '') body.append(...asWritten);
    else sort(Number(by.value));
});
for (const input of [filter, budget, passing]) input.addEventListener('input', show);
document.querySelector('.tools').hidden = false;
show();
