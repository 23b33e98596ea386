/** What Vite makes of an import that ends so. */
declare module '*?url' {
    const address: string;
    export default address;
}
