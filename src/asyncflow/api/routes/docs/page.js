/*
 * Draws openapi.json. Whatever it says becomes text nodes, never markup.
 *
 * Understands what AsyncFlow's description uses of OpenAPI 3.1, not all of it.
 */
"use strict";

function node(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

/* Text with `code` in backticks. */
function prose(text) {
  return (text ?? "").trim().split("`").map((part, i) => (i % 2 ? node("code", {}, part) : part));
}

class Description {
  constructor(document) {
    this.document = document;
    this.schemas = document.components?.schemas ?? {};
  }

  operations(tag) {
    const found = [];
    for (const [path, methods] of Object.entries(this.document.paths))
      for (const [method, operation] of Object.entries(methods))
        if (operation.tags?.includes(tag)) found.push({ method, path, ...operation });
    return found;
  }

  resolve(schema) {
    const name = schema?.$ref?.split("/").pop();
    return name ? { title: name, ...this.schemas[name] } : schema ?? {};
  }

  /* Without "or null", which every optional field is. */
  essence(schema) {
    const choices = (schema.anyOf ?? []).filter((choice) => choice.type !== "null");
    return choices.length === 1 ? { ...schema, ...this.resolve(choices[0]), anyOf: undefined } : this.resolve(schema);
  }

  typeOf(schema) {
    if (schema.$ref) return schema.$ref.split("/").pop();
    if (schema.anyOf) return schema.anyOf.map((choice) => this.typeOf(choice)).join(" or ");
    if (schema.enum) return schema.enum.join(", ");
    if (schema.const) return schema.const;
    if (schema.type === "array") return `array of ${this.typeOf(schema.items ?? {})}`;
    const bounds = this.boundsOf(schema);
    return (schema.format ?? schema.type ?? "anything") + (bounds ? ` ${bounds}` : "");
  }

  boundsOf(schema) {
    const { minimum: low, maximum: high } = schema;
    if (low !== undefined && high !== undefined) return `${low} … ${high}`;
    return low !== undefined ? `≥ ${low}` : high !== undefined ? `≤ ${high}` : "";
  }

  example(schema) {
    const plain = this.essence(schema ?? {});
    if (plain.examples?.length) return plain.examples[0];
    if (plain.default !== undefined && plain.default !== null) return plain.default;
    if (plain.enum) return plain.enum[0];
    if (plain.const) return plain.const;
    if ((schema.anyOf ?? []).some((choice) => choice.type === "null")) return null;
    switch (plain.type) {
      case "object":
        return Object.fromEntries(Object.entries(plain.properties ?? {}).map(([name, of]) => [name, this.example(of)]));
      case "array": return [this.example(plain.items ?? {})];
      case "integer": case "number": return plain.minimum ?? 1;
      case "boolean": return true;
      case "string": return plain.format === "uuid" ? "0192f0c1-2b3c-7d4e-8f50-123456789abc" : "…";
      default: return null;
    }
  }
}

function fields(description, schema) {
  const required = new Set(schema.required ?? []);
  const rows = Object.entries(schema.properties ?? {}).map(([name, field]) =>
    fieldRow(description, name, field, required.has(name) && field.default === undefined));
  return node("dl", { class: "fields" }, rows);
}

function fieldRow(description, name, field, required) {
  const plain = description.essence(field);
  const fallback = plain.default !== undefined && plain.default !== null
    ? `, default ${JSON.stringify(plain.default)}` : "";
  return node("div", {},
    node("dt", {}, name, required ? node("small", {}, "required") : null),
    node("dd", {},
      node("div", { class: "type" }, typeLink(description, field), fallback),
      field.description ? node("div", {}, prose(field.description)) : null));
}

function typeLink(description, field) {
  const choices = (field.anyOf ?? [field]).filter((choice) => choice.type !== "null");
  const target = choices[0].items?.$ref ?? choices[0].$ref;
  const text = description.typeOf(choices.length === 1 ? choices[0] : field);
  return target ? node("a", { href: `#shape-${target.split("/").pop()}` }, text) : text;
}

function answers(operation) {
  const items = Object.entries(operation.responses).map(([status, answer]) =>
    node("li", {}, node("span", { class: `status ${status < 400 ? "good" : "bad"}` }, status),
      node("span", {}, prose(answer.description))));
  return node("ul", { class: "answers" }, items);
}

function bodySchema(description, operation) {
  return description.resolve(operation.requestBody?.content["application/json"].schema);
}

function told(description, operation) {
  const parts = [
    node("h3", {}, operation.summary),
    node("p", { class: "route" },
      node("span", { class: `method ${operation.method}` }, operation.method.toUpperCase()),
      node("span", { class: "path" }, operation.path)),
    node("p", {}, prose(operation.description)),
  ];
  if (operation.parameters?.length) {
    parts.push(node("h4", {}, "Parameters"), node("dl", { class: "fields" },
      operation.parameters.map((parameter) => fieldRow(
        description, parameter.name,
        { ...parameter.schema, description: parameter.description ?? parameter.schema.description },
        parameter.required))));
  }
  if (operation.requestBody) parts.push(node("h4", {}, "Body"), fields(description, bodySchema(description, operation)));
  parts.push(node("h4", {}, "Responses"), answers(operation));
  return node("div", { class: "told" }, parts);
}

function curl(operation, body) {
  const lines = [`curl ${operation.method === "get" ? "" : `-X ${operation.method.toUpperCase()} `}${new URL(".", location.href)}${operation.path.slice(1)}`];
  if (body !== undefined) {
    lines.push("  -H 'Content-Type: application/json'");
    lines.push(`  -d '${JSON.stringify(body)}'`);
  }
  return lines.join(" \\\n");
}

function panel(description, operation) {
  const body = operation.requestBody ? description.example(bodySchema(description, operation)) : undefined;
  const [status, answer] = Object.entries(operation.responses).find(([code]) => code < 400);
  const shape = answer.content?.["application/json"]?.schema;
  const command = curl(operation, body);
  const result = node("pre", {}, shape ? JSON.stringify(description.example(shape), null, 2) : "");
  const heading = node("header", {}, node("span", {}, "Example response"), node("span", { class: "status good" }, status));
  const made = node("aside", { class: "panel", "aria-label": `Example: ${operation.summary}` },
    node("header", {}, node("span", {}, "Request"),
      node("button", { class: "link", type: "button", onclick: () => navigator.clipboard?.writeText(command) }, "Copy")),
    node("pre", {}, command), tryIt(operation, body, heading, result), heading, result);
  return made;
}

function tryIt(operation, body, heading, result) {
  const inputs = (operation.parameters ?? []).map((parameter) => node("input", {
    name: parameter.name, "data-in": parameter.in, "data-several": parameter.schema.type === "array" ? "" : false,
    required: parameter.required ? "" : false, placeholder: parameter.required ? "" : "any", spellcheck: "false" }));
  const text = body === undefined ? null : node("textarea", { "aria-label": "Body", spellcheck: "false" });
  if (text) {
    text.value = JSON.stringify(body, null, 2);
    text.rows = text.value.split("\n").length + 1;
  }
  const send = async (event) => {
    event.preventDefault();
    const [status, content] = await request(operation, inputs, text?.value);
    heading.replaceChildren(node("span", {}, "Response"),
      node("span", { class: `status ${status < 400 ? "good" : "bad"}` }, String(status || "failed")));
    result.textContent = content;
  };
  return node("form", { onsubmit: send },
    inputs.map((input) => node("label", {}, input.name, input)), text,
    node("button", { type: "submit" }, "Send"));
}

async function request(operation, inputs, body) {
  let path = operation.path;
  const query = new URLSearchParams();
  for (const { name, value, dataset } of inputs) {
    if (dataset.in === "path") path = path.replace(`{${name}}`, encodeURIComponent(value.trim()));
    else if (value.trim() && dataset.several === undefined) query.set(name, value.trim());
    else for (const one of value.split(/[\s,]+/).filter(Boolean)) query.append(name, one);
  }
  try {
    const answer = await fetch(new URL(path.slice(1) + (query.size ? `?${query}` : ""), location.href), {
      method: operation.method.toUpperCase(), body,
      headers: body === undefined ? {} : { "Content-Type": "application/json" } });
    return [answer.status, pretty(await answer.text())];
  } catch (error) {
    return [0, `The server did not answer: ${error.message}`];
  }
}

function pretty(text) {
  try { return JSON.stringify(JSON.parse(text), null, 2); } catch { return text; }
}

function operationSection(description, operation) {
  return node("section", { class: "operation", id: operation.operationId },
    told(description, operation), panel(description, operation));
}

function shapeSection(description, [name, schema]) {
  return node("section", { class: "shape", id: `shape-${name}` },
    node("h3", {}, name), node("p", { class: "quiet" }, prose(schema.description)), fields(description, schema));
}

function problemSection([kind, { title, status, meaning }]) {
  return node("div", { id: `problem-${kind}` },
    node("dt", {}, kind), node("dd", {}, node("span", { class: "type" }, `${status} ${title}`), node("div", {}, prose(meaning))));
}

function contents(description) {
  const { info, tags } = description.document;
  const groups = tags.map((tag) => [
    node("h2", {}, tag.name),
    description.operations(tag.name).map((operation) => node("a", { href: `#${operation.operationId}` },
      node("span", { class: `method ${operation.method}` }, operation.method.toUpperCase()), operation.summary)),
  ]);
  return [node("div", { class: "brand" }, info.title, node("small", {}, info.version)), groups,
    node("h2", {}, "reference"),
    node("a", { href: "#problems" }, "Problems"), node("a", { href: "#shapes" }, "Schemas"),
    node("a", { class: "plain", href: "openapi.json" }, "openapi.json")];
}

function reference(description) {
  const { info, tags, "x-problems": problems } = description.document;
  const groups = tags.map((tag) => [
    node("h2", { class: "group" }, tag.name[0].toUpperCase() + tag.name.slice(1)),
    node("p", { class: "quiet" }, prose(tag.description)),
    description.operations(tag.name).map((operation) => operationSection(description, operation)),
  ]);
  return [
    node("h1", {}, `${info.title} HTTP API`), node("p", { class: "lead" }, prose(info.description)), groups,
    node("h2", { class: "group", id: "problems" }, "Problems"),
    node("p", { class: "quiet" }, "The values of ", node("code", {}, "type"), " in a problem document."),
    node("dl", { class: "fields shape" }, Object.entries(problems ?? {}).map(problemSection)),
    node("h2", { class: "group", id: "shapes" }, "Schemas"),
    Object.entries(description.schemas).filter(([, schema]) => schema.properties).map((entry) => shapeSection(description, entry)),
  ];
}

async function draw() {
  const main = document.getElementById("reference");
  try {
    const description = new Description(await (await fetch("openapi.json")).json());
    document.getElementById("contents").replaceChildren(...contents(description).flat(3));
    main.replaceChildren(...reference(description).flat(3));
    if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
  } catch (error) {
    main.replaceChildren(node("p", {}, `The API description could not be loaded: ${error.message}`));
  }
}

draw();
