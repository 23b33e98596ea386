// A page of its own, in the place of a popup, which would close as soon as a file is chosen.
chrome.action.onClicked.addListener(() => chrome.tabs.create({ url: 'index.html' }));
