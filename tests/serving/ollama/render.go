// Renders the TEMPLATE of a Modelfile as Ollama does (template/template.go of ollama/ollama, August 2026): messages of
// one role that follow each other are joined by an empty line, and .System is all system messages, joined so.
// Input: {"template": …, "rows": [[{"role": …, "content": …}]]}; output: a list of texts.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

func collate(messages []message) (string, []*message) {
	var system []string
	var found []*message
	for i := range messages {
		one := messages[i]
		if one.Role == "system" {
			system = append(system, one.Content)
		}
		if last := len(found) - 1; last >= 0 && found[last].Role == one.Role {
			found[last].Content += "\n\n" + one.Content
		} else {
			found = append(found, &one)
		}
	}
	return strings.Join(system, "\n\n"), found
}

func main() {
	var given struct {
		Template string
		Rows     [][]message
	}
	if err := json.NewDecoder(os.Stdin).Decode(&given); err != nil {
		panic(err)
	}
	parsed := template.Must(template.New("").Option("missingkey=zero").Parse(given.Template))
	texts := []string{}
	for _, row := range given.Rows {
		var text strings.Builder
		system, messages := collate(row)
		if err := parsed.Execute(&text, map[string]any{"System": system, "Messages": messages, "Response": ""}); err != nil {
			panic(err)
		}
		texts = append(texts, text.String())
	}
	if err := json.NewEncoder(os.Stdout).Encode(texts); err != nil {
		panic(err)
	}
}
