/**
 * The line at the top: which model, how the server is, and the switches of the panels. Must not know: what is in them.
 */
import type { RefObject } from "react";
import { stateInWords } from "./Connection";
import { Icon } from "./Icon";
import type { View } from "./server";

interface Props {
  view: View;
  /** Null where the list is always there. */
  onDrawer: (() => void) | null;
  isDrawerOpen: boolean;
  isClusterOpen: boolean;
  onCluster: (isOpen: boolean) => void;
  isParametersOpen: boolean;
  onParameters: (isOpen: boolean) => void;
  parametersButton: RefObject<HTMLButtonElement | null>;
}

export function Header({ view, onDrawer, isDrawerOpen, isClusterOpen, onCluster, isParametersOpen, onParameters, parametersButton }: Props) {
  const { phase, health, config } = view;
  return (
    <header>
      {onDrawer && (
        <button type="button" className="quiet" aria-label="Conversations" title="Conversations" aria-expanded={isDrawerOpen} onClick={onDrawer}>
          <Icon name="menu" />
        </button>
      )}
      <h1>
        <img src="/favicon.svg" alt="" width="24" height="24" /> mpgpt
      </h1>
      <span className="model" data-testid="model">
        <Model name={config?.model ?? health?.model ?? ""} />
      </span>
      <span className="state" data-state={phase === "here" ? (health?.status ?? "ok") : phase} data-testid="state">
        {stateInWords(view)}
      </span>
      <button type="button" className="toggle" aria-expanded={isClusterOpen} aria-controls="cluster" onClick={() => onCluster(!isClusterOpen)}>
        <Icon name="ring" /> <span>Cluster</span>
      </button>
      <button
        ref={parametersButton}
        type="button"
        className="toggle"
        aria-expanded={isParametersOpen}
        aria-controls="parameters"
        onClick={() => onParameters(!isParametersOpen)}
      >
        <Icon name="sliders" /> <span>Parameters</span>
      </button>
    </header>
  );
}

/** A model's name; where there is little room, without whose it is. */
function Model({ name }: { name: string }) {
  const at = name.lastIndexOf("/") + 1;
  return (
    <>
      {at > 0 && <span className="org">{name.slice(0, at)}</span>}
      {name.slice(at)}
    </>
  );
}
