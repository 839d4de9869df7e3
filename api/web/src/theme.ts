/**
 * Light, dark, or as the system has it. Knows: the attribute that the style sheets look at. Must not know: colours.
 */
import { keep, recall } from "./browser";

export const THEMES = ["system", "light", "dark"] as const;
export type Theme = (typeof THEMES)[number];
const THEME = "mpgpt.theme";

export const themeChosen = (): Theme => THEMES.find((theme) => theme === recall(THEME)) ?? "system";

export function chooseTheme(theme: Theme): void {
  keep(THEME, theme === "system" ? null : theme);
  applyTheme(theme);
}

export function applyTheme(theme: Theme): void {
  if (theme === "system") delete document.documentElement.dataset["theme"];
  else document.documentElement.dataset["theme"] = theme;
}
