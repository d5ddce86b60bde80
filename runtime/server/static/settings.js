// The settings panel: what is asked of the server besides the messages, and what this browser keeps.

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const TEXTS = ["system", "tools", "tool_choice"];

const EXAMPLE = [
  {
    type: "function",
    function: {
      name: "calculate",
      description: "Evaluates an arithmetic expression.",
      parameters: {
        type: "object",
        properties: { expression: { type: "string", description: "For example 2 * (3 + 4)" } },
        required: ["expression"],
        additionalProperties: false,
      },
    },
  },
];

/** A setting that cannot be sent: `field` is its name. */
export class SettingError extends Error {
  constructor(name, message) {
    super(message);
    this.field = name;
  }
}

export class Settings {
  #fields;

  constructor(fields) {
    this.#fields = fields;
    for (const [name, field] of Object.entries(fields)) field.addEventListener("input", () => this.unmark(name));

    document.getElementById("tools-example").addEventListener("click", () => {
      fields.tools.value = JSON.stringify(EXAMPLE, null, 2);
      fields.tools.dispatchEvent(new Event("input", { bubbles: true }));
    });
  }

  get system() {
    return this.#fields.system.value.trim();
  }

  get key() {
    return this.#fields.key.value.trim();
  }

  set key(value) {
    this.#fields.key.value = value;
  }

  get model() {
    return this.#fields.model.value;
  }

  /**
   * Fields of a request. What is left empty is left away: the server's default holds. Throws SettingError where a
   * field cannot be sent, so that nothing is sent other than what the panel shows.
   */
  request() {
    const out = { model: this.model };
    for (const name of NUMBERS) {
      const field = this.#fields[name];
      if (!field.checkValidity()) throw new SettingError(name, field.validationMessage);
      if (field.value !== "") out[name] = Number(field.value);
    }
    const tools = this.#tools();
    if (tools.length) Object.assign(out, { tools, tool_choice: this.#fields.tool_choice.value });
    return out;
  }

  #tools() {
    const text = this.#fields.tools.value.trim();
    if (!text) return [];
    let tools;
    try {
      tools = JSON.parse(text);
    } catch (error) {
      throw new SettingError("tools", `Not JSON: ${error.message}`);
    }
    if (!Array.isArray(tools)) throw new SettingError("tools", "Write an array: [{\"type\": \"function\", …}]");
    return tools;
  }

  /** Plain data for `restore`; the key is not in it. */
  save() {
    const names = [...NUMBERS, ...TEXTS, "model"];
    return Object.fromEntries(names.map((name) => [name, this.#fields[name].value]));
  }

  restore(saved) {
    if (!saved || typeof saved !== "object") return;
    for (const name of [...NUMBERS, ...TEXTS]) {
      if (typeof saved[name] === "string") this.#fields[name].value = saved[name];
    }
    // Set when it was none of the choices, a select shows nothing at all.
    if (this.#fields.tool_choice.value === "") this.#fields.tool_choice.value = "auto";
  }

  /** The field that an error's `param` names ("tools[0].function" is in `tools`); null where there is none. */
  fieldOf(param) {
    const name = /^\w+/.exec(param ?? "")?.[0];
    return name && Object.hasOwn(this.#fields, name) ? name : null;
  }

  /** Marks a field as wrong, says why beneath it, and goes there. */
  mark(name, message) {
    const field = this.#fields[name];
    field.setAttribute("aria-invalid", "true");
    const line = document.getElementById(`${name}-error`);
    if (line) [line.textContent, line.hidden] = [message, false];
    field.focus();
  }

  unmark(name) {
    this.#fields[name].removeAttribute("aria-invalid");
    const line = document.getElementById(`${name}-error`);
    if (line) line.hidden = true;
  }
}
