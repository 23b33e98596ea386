/**
 * Opens a page in headless Chromium, calls its `run(request)`, and writes what came of it as one JSON object to stdout.
 *
 * Reads one JSON `Job` from stdin. Exit status 1 and the reason on stderr when the browser, the page or `run` fails.
 *
 * @typedef {{ chromium: string, flags: string[], url: string, request: object, seconds: number }} Job
 *     `seconds` is how long the page may take.
 * @typedef {{ answer: object, console: string[], foreign: string[], chromium: string }} Result  What the page logged,
 *     as "type: text", and what it asked of other servers than its own.
 */

import { text } from 'node:stream/consumers';

import { chromium } from 'playwright-core';

/** @type {(browser: import('playwright-core').Browser, job: Job) => Promise<Result>} */
async function visit(browser, { url, request, seconds }) {
    const page = await browser.newPage();
    const logged = [];
    const foreign = [];
    page.on('console', (message) => logged.push(`${message.type()}: ${message.text()}`));
    page.on('request', (sent) => {
        if (sent.url().startsWith('http') && new URL(sent.url()).origin !== new URL(url).origin) {
            foreign.push(sent.url());
        }
    });
    // Not every promise of the loader is awaited: without the first of these, `run` may never settle.
    const broken = new Promise((_, reject) => {
        page.on('pageerror', reject);
        page.on('crash', () => reject(new Error('the page crashed')));
        setTimeout(() => reject(new Error(`no answer for ${seconds} s`)), seconds * 1000).unref();
    });
    async function call() {
        await page.goto(url);
        return page.evaluate((request) => window.run(request), request);
    }
    const answer = await Promise.race([call(), broken]);
    return { answer, console: logged, foreign, chromium: browser.version() };
}

const job = JSON.parse(await text(process.stdin));
const browser = await chromium.launch({ executablePath: job.chromium, args: job.flags });
try {
    process.stdout.write(JSON.stringify(await visit(browser, job)));
} finally {
    await browser.close();
}
