/** Of what browsers give to extensions, what is used here. */
declare const chrome: {
    action: { onClicked: { addListener(listener: () => void): void } };
    tabs: { create(options: { url: string }): Promise<unknown> };
};
