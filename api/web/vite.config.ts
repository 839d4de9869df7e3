/**
 * How the page is built, tested, and served while it is worked on.
 *
 * The built page goes into the Python package, whose server has a strict Content-Security-Policy: nothing may be inlined.
 * `npm run dev` serves it at port 3000 and hands what is the API's on to MPGPT_API. The Origin header is left out of
 * that: the server refuses what comes from pages of another origin, as it should.
 */
import react from "@vitejs/plugin-react";
import { defineConfig } from "vitest/config";

const API = process.env["MPGPT_API"] ?? "http://127.0.0.1:8000";
const PATHS = ["/health", "/config", "/cluster", "/chat", "/query", "/reconnect", "/metrics", "/v1"];

const proxied = {
  target: API,
  changeOrigin: true,
  configure: (proxy: { on(event: "proxyReq", heard: (request: { removeHeader(name: string): void }) => void): unknown }) => {
    proxy.on("proxyReq", (request) => request.removeHeader("origin"));
  },
};

export default defineConfig({
  plugins: [react()],
  build: {
    outDir: "../mpgpt_api/page",
    emptyOutDir: true,
    sourcemap: false,
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    license: { fileName: "assets/licenses.md" },
  },
  server: { port: 3000, strictPort: true, proxy: Object.fromEntries(PATHS.map((path) => [path, proxied])) },
  test: { environment: "jsdom", setupFiles: ["src/test/setup.ts"], restoreMocks: true, unstubGlobals: true },
});
