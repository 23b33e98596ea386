/**
 * Captions an image in an unpacked browser extension, and prints `{ caption, foreign }`: what it says, and what its page
 * asked of any server. Arguments: the path of Chromium, the extension's folder, the image.
 */

import { chromium } from 'playwright-core';

const [executablePath, extension, image] = process.argv.slice(2);
const context = await chromium.launchPersistentContext('', {
    executablePath,
    args: [
        '--no-sandbox',
        '--disable-gpu',
        `--disable-extensions-except=${extension}`,
        `--load-extension=${extension}`,
    ],
    ignoreDefaultArgs: ['--disable-extensions'],
});
try {
    const [script] = [...context.serviceWorkers(), await context.waitForEvent('serviceworker').catch(() => null)];
    const page = await context.newPage();
    /** @type {string[]} */
    const foreign = [];
    page.on('request', (sent) => sent.url().startsWith('http') && foreign.push(sent.url()));
    await page.goto(new URL('index.html', script?.url()).href);
    await page.setInputFiles('#file:enabled', image);
    await page.waitForSelector('#caption:not(:text("Loading")):not(:text("Choose"))');
    console.log(JSON.stringify({ caption: await page.textContent('#caption'), foreign }));
} finally {
    await context.close();
}
