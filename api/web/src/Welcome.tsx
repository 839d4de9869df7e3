/**
 * What an empty conversation shows: what this is, and a few things to begin with. Must not know: how they are sent.
 */
const QUESTIONS = ["Why is the sky blue?", "Explain a mutex to a child.", "Write a haiku about small computers."];
const BEGINNINGS = ["Once upon a time", "The three laws of robotics are", "def fibonacci(n):"];

export function Welcome({ model, isRaw, onIdea }: { model: string | null; isRaw: boolean; onIdea: (text: string) => void }) {
  return (
    <div className="welcome">
      <h2>{isRaw ? "Begin a text" : "Ask the ring"}</h2>
      <p>
        {isRaw ? "The model goes on where your text ends." : "Your machines answer together, each with its own layers of the model."}
        {model && (
          <>
            {" "}
            This is <strong>{model}</strong>.
          </>
        )}
      </p>
      <ul className="ideas">
        {(isRaw ? BEGINNINGS : QUESTIONS).map((idea) => (
          <li key={idea}>
            <button type="button" onClick={() => onIdea(idea)}>
              {idea}
            </button>
          </li>
        ))}
      </ul>
    </div>
  );
}
