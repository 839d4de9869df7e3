/**
 * A button that copies a text and says for a moment that it did.
 */
import { useEffect, useState } from "react";
import { copy } from "./browser";
import { Icon } from "./Icon";

export function CopyButton({ name, text }: { name: string; text: () => string }) {
  const [said, say] = useState<"" | "Copied" | "Not copied">("");
  useEffect(() => {
    if (said === "") return;
    const timer = setTimeout(() => say(""), 1600);
    return () => clearTimeout(timer);
  }, [said]);
  const press = async (): Promise<void> => say((await copy(text())) ? "Copied" : "Not copied");
  return (
    <button type="button" className="quiet" aria-label={name} title={name} onClick={() => void press()}>
      <Icon name={said === "Copied" ? "done" : "copy"} />
      <span className="said" role="status">
        {said}
      </span>
    </button>
  );
}
