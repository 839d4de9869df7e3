/**
 * The parameters of a conversation, each with the server's default where nothing was changed.
 *
 * Knows: labels, and where a sentence stands when something is wrong. Must not know: how they are sent or kept.
 */
import { useId, useState } from "react";
import type { Config, Strategy } from "./api";
import { check, STRATEGIES, withField, type Changed, type Field } from "./parameters";

interface Props {
  changed: Changed;
  config: Config | null;
  isRaw: boolean;
  onChange: (changed: Changed) => void;
}

const STRATEGY_NAMES: Record<Strategy, string> = {
  greedy: "greedy: always the likeliest token",
  sampling: "sampling: among all tokens",
  top_k: "top_k: among the k likeliest",
  top_p: "top_p: among those that make up p",
};

export function Parameters({ changed, config, isRaw, onChange }: Props) {
  const [resets, setResets] = useState(0);
  const set = (field: Field) => (value: Changed[Field] | undefined) => onChange(withField(changed, field, value));
  const strategy = changed.decoding_strategy ?? config?.strategy;
  const greedy = strategy === "greedy" ? "Greedy does without it." : undefined;
  const given = config?.parameters;
  const of = (field: Field) => ({ field, value: changed[field], config, onSet: set(field) });
  return (
    <div className="parameters" key={resets}>
      <Strategies value={changed.decoding_strategy} config={config} onSet={set("decoding_strategy")} />
      <Typed {...of("max_tokens")} label="Max tokens" standard={config?.max_new_tokens} />
      <Typed {...of("temperature")} label="Temperature" standard={given?.temperature} note={greedy} />
      <Typed {...of("top_p")} label="Top-p" standard={given?.top_p} note={greedy} />
      <Typed {...of("top_k")} label="Top-k" standard={given?.top_k} note={greedy ?? "0 is all of them."} />
      <Typed {...of("seed")} label="Seed" standard="a new one each time" note={greedy} />
      <System {...{ value: changed.system, config, isRaw }} onSet={set("system")} />
      <button
        type="button"
        className="small"
        onClick={() => {
          onChange({});
          setResets(resets + 1);
        }}
      >
        Reset parameters
      </button>
      <p className="hint">Kept with this conversation; the next new one begins with them.</p>
    </div>
  );
}

interface TypedProps {
  field: Field;
  label: string;
  value: string | number | undefined;
  standard: string | number | undefined;
  note?: string | undefined;
  config: Config | null;
  onSet: (value: string | number | undefined) => void;
}

/** A field of text. What is wrong in it stays to be read and put right; until then the last right value holds. */
function Typed({ field, label, value, standard, note, config, onSet }: TypedProps) {
  const id = useId();
  const [typed, setTyped] = useState(value === undefined ? "" : String(value));
  const { problem } = check(field, typed, config);
  const onChange = (text: string): void => {
    setTyped(text);
    const checked = check(field, text, config);
    if (checked.problem === null) onSet(checked.value);
  };
  return (
    <div className="parameter">
      <label htmlFor={id}>{label}</label>
      <input
        id={id}
        type="text"
        inputMode={field === "temperature" || field === "top_p" ? "decimal" : "numeric"}
        autoComplete="off"
        value={typed}
        placeholder={standard === undefined ? "" : String(standard)}
        aria-invalid={problem !== null}
        aria-describedby={problem || note ? `${id}-note` : undefined}
        onChange={(event) => onChange(event.target.value)}
      />
      {(problem || note) && (
        <p id={`${id}-note`} className={problem ? "problem" : "hint"}>
          {problem ?? note}
        </p>
      )}
    </div>
  );
}

function Strategies({ value, config, onSet }: { value: Strategy | undefined; config: Config | null; onSet: (value: Strategy | undefined) => void }) {
  const id = useId();
  return (
    <div className="parameter">
      <label htmlFor={id}>Strategy</label>
      <select id={id} value={value ?? ""} onChange={(event) => onSet(STRATEGIES.find((one) => one === event.target.value))}>
        <option value="">{config ? `the server's: ${config.strategy}` : "the server's"}</option>
        {STRATEGIES.map((one) => (
          <option key={one} value={one}>
            {STRATEGY_NAMES[one]}
          </option>
        ))}
      </select>
    </div>
  );
}

interface SystemProps {
  value: string | undefined;
  config: Config | null;
  isRaw: boolean;
  onSet: (value: string | undefined) => void;
}

function System({ value, config, isRaw, onSet }: SystemProps) {
  const id = useId();
  return (
    <div className="parameter">
      <label htmlFor={id}>System prompt</label>
      <textarea
        id={id}
        rows={4}
        value={value ?? ""}
        placeholder={config?.system ?? "none"}
        aria-describedby={isRaw ? `${id}-note` : undefined}
        onChange={(event) => onSet(event.target.value === "" ? undefined : event.target.value)}
      />
      {isRaw && (
        <p id={`${id}-note`} className="hint">
          Raw completion sends the text alone, without it.
        </p>
      )}
    </div>
  );
}
