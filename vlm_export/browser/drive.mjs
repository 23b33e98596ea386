/**
 * Uses a page in headless Chromium, and writes what comes of it to stdout, one JSON object a line.
 *
 * Reads one JSON `Job` from stdin. What the page calls `send(answer)` with is a line at once, a `Result` the last one;
 * on failure of the browser, the page or a step it is `{"error": "…"}`, and the exit status 1. What it calls
 * `save(name, base64)` with becomes a file of that name in the working directory.
 *
 * @typedef {{ chromium: string, flags: string[], url: string, steps: [string, ...unknown[]][] }} Job
 *     A step is a method of Playwright's `Page` or of a part of it, as `keyboard.press`, and its arguments; the one
 *     of `waitForFunction` is a function's body.
 * @typedef {{ done: true, answers: unknown[], console: string[], foreign: string[], chromium: string }} Result  What
 *     came of each step that is an `evaluate`, what the page logged, as "type: text", and what it asked of other servers
 *     than its own.
 */

import { writeFile } from 'node:fs/promises';
import { basename } from 'node:path';
import { text } from 'node:stream/consumers';

import { chromium } from 'playwright-core';

/** @param {unknown} answer */
function send(answer) {
    process.stdout.write(`${JSON.stringify(answer)}\n`);
}

/** @type {(browser: import('playwright-core').Browser, job: Job) => Promise<Result>} */
async function visit(browser, { url, steps }) {
    const page = await browser.newPage();
    await page.exposeFunction('send', send);
    await page.exposeFunction('save', (/** @type {string} */ name, /** @type {string} */ base64) =>
        writeFile(basename(name), Buffer.from(base64, 'base64')),
    );
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
    return { done: true, answers, console: logged, foreign, chromium: browser.version() };
}

/**
 * A page whose policy forbids `eval` is waited for with a function only.
 * @param {unknown} body
 */
function to_function(body) {
    return new Function(String(body));
}

/**
 * What Playwright says when Chromium does not start, without the command and the log, which is the same again.
 * @param {string} message
 */
function withoutCommand(message) {
    const [said] = message.split('\nCall log:');
    return said
        .split('\n')
        .filter((line) => !/^\s*<launch/.test(line))
        .join('\n');
}

/** @param {Job} job */
async function main(job) {
    const browser = await chromium.launch({ executablePath: job.chromium, args: job.flags, handleSIGTERM: false });
    // Playwright would kill Chromium, and leave what that has in the folder of temporary files.
    process.once('SIGTERM', () => browser.close().finally(() => process.exit(1)));
    try {
        send(await visit(browser, job));
    } finally {
        await browser.close();
    }
}

main(JSON.parse(await text(process.stdin))).catch((error) => {
    send({ error: withoutCommand(String(error?.message ?? error)) });
    process.exitCode = 1;
});
