/**
 * Uses a page in headless Chromium, and writes what came of it as one JSON object to stdout.
 *
 * Reads one JSON `Job` from stdin. Exit status 1 and the reason on stderr when the browser, the page or a step fails.
 *
 * @typedef {{ chromium: string, flags: string[], url: string, steps: [string, ...unknown[]][], seconds: number }} Job
 *     A step is a method of Playwright's `Page` or of a part of it, as `keyboard.press`, and its arguments; the one
 *     of `waitForFunction` is a function's body. `seconds` is how long all of them may take.
 * @typedef {{ answers: unknown[], console: string[], foreign: string[], chromium: string }} Result  What came of each step
 *     that is an `evaluate`, what the page logged, as "type: text", and what it asked of other servers than its own.
 */

import { text } from 'node:stream/consumers';

import { chromium } from 'playwright-core';

/** @type {(browser: import('playwright-core').Browser, job: Job) => Promise<Result>} */
async function visit(browser, { url, steps, seconds }) {
    const page = await browser.newPage();
    /** @type {string[]} */
    const logged = [];
    /** @type {string[]} */
    const foreign = [];
    page.on('console', (message) => logged.push(`${message.type()}: ${message.text()}`));
    page.on('request', (sent) => {
        if (sent.url().startsWith('http') && new URL(sent.url()).origin !== new URL(url).origin) {
            foreign.push(sent.url());
        }
    });
    // Not every promise of the loader is awaited: without the first of these, a step may never settle.
    const broken = new Promise((_, reject) => {
        page.on('pageerror', reject);
        page.on('crash', () => reject(new Error('the page crashed')));
        setTimeout(() => reject(new Error(`no answer for ${seconds} s`)), seconds * 1000).unref();
    });
    /** @type {unknown[]} */
    const answers = [];
    async function take() {
        await page.goto(url);
        for (const [path, ...args] of steps) {
            const [name, ...parts] = path.split('.').reverse();
            const owner = parts.reduceRight((object, part) => Reflect.get(object, part), /** @type {object} */ (page));
            const given = name === 'waitForFunction' ? args.map(to_function) : args;
            const value = await Reflect.apply(Reflect.get(owner, name), owner, given);
            if (name === 'evaluate') {
                answers.push(value);
            }
        }
    }
    await Promise.race([take(), broken]);
    return { answers, console: logged, foreign, chromium: browser.version() };
}

/**
 * A page whose policy forbids `eval` is waited for with a function only.
 * @param {unknown} body
 */
function to_function(body) {
    return new Function(String(body));
}

/** @type {Job} */
const job = JSON.parse(await text(process.stdin));
const browser = await chromium.launch({ executablePath: job.chromium, args: job.flags });
try {
    process.stdout.write(JSON.stringify(await visit(browser, job)));
} finally {
    await browser.close();
}
