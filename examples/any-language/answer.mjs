// A program for run.py: it renders the chat template of a checkpoint folder and encodes the text, without labels.
// Usage: npm install @huggingface/tokenizers @huggingface/jinja && node answer.mjs FOLDER
import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";
import { Template } from "@huggingface/jinja";
import { Tokenizer } from "@huggingface/tokenizers";

const folder = process.argv[2];
const read = (name) => readFileSync(`${folder}/${name}`, "utf8");
const config = JSON.parse(read("tokenizer_config.json"));
const tokenizer = new Tokenizer(JSON.parse(read("tokenizer.json")), config);
const template = new Template(read("chat_template.jinja"));

for await (const line of createInterface({ input: process.stdin })) {
  const { row } = JSON.parse(line);
  // this engine raises an error if a template loops over a key that a message lacks; Jinja2 loops over nothing
  const messages = row.messages.map((message) => ({ content: null, ...message }));
  let answer;
  try {
    const text = template.render({ ...row, messages, bos_token: "<s>", eos_token: "</s>" });
    answer = { input_ids: tokenizer.encode(text, { add_special_tokens: false }).ids };
  } catch (error) {
    answer = { refused: `${error}` };
  }
  console.log(JSON.stringify(answer));
}
