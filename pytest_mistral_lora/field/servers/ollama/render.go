// Renders the TEMPLATE of a Modelfile as Ollama does (template/template.go of ollama/ollama, August 2026): messages of
// one role that follow each other are joined by an empty line, and .System is all system messages, joined so. A
// template that does not name .Messages is rendered once for each turn, and the last time up to .Response.
// Arguments: a file with {"template": …, "rows": [[{"role": …, "content": …}]]}, and the file of the answer: a list of
// {"text": …} or {"error": …}.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"text/template"
	"text/template/parse"
	"time"
)

type message struct{ Role, Content, Thinking string }

type answer struct {
	Text  string `json:"text"`
	Error string `json:"error,omitempty"`
}

var functions = template.FuncMap{
	"json": func(value any) string {
		text, _ := json.Marshal(value)
		return string(text)
	},
	"currentDate": func(...string) string { return time.Now().Format("2006-01-02") },
}

func collate(messages []message) (string, []*message) {
	var system []string
	var found []*message
	for i := range messages {
		one := messages[i]
		if one.Role == "system" {
			system = append(system, one.Content)
		}
		if last := len(found) - 1; last >= 0 && found[last].Role == one.Role && one.Role != "tool" {
			found[last].Content += "\n\n" + one.Content
		} else {
			found = append(found, &one)
		}
	}
	return strings.Join(system, "\n\n"), found
}

// names adds the names of fields and variables below a node, in lower case.
func names(node parse.Node, found map[string]bool) {
	add := func(parts []string) {
		for _, part := range parts {
			found[strings.ToLower(part)] = true
		}
	}
	switch one := node.(type) {
	case *parse.ListNode:
		if one != nil {
			for _, child := range one.Nodes {
				names(child, found)
			}
		}
	case *parse.ActionNode:
		names(one.Pipe, found)
	case *parse.TemplateNode:
		names(one.Pipe, found)
	case *parse.IfNode:
		branch(&one.BranchNode, found)
	case *parse.RangeNode:
		branch(&one.BranchNode, found)
	case *parse.WithNode:
		branch(&one.BranchNode, found)
	case *parse.PipeNode:
		if one != nil {
			for _, command := range one.Cmds {
				for _, argument := range command.Args {
					names(argument, found)
				}
			}
		}
	case *parse.FieldNode:
		add(one.Ident)
	case *parse.VariableNode:
		add(one.Ident)
	}
}

func branch(node *parse.BranchNode, found map[string]bool) {
	names(node.Pipe, found)
	names(node.List, found)
	names(node.ElseList, found)
}

// cut removes .Response and all that follows it; it returns whether something is left of a node.
func cut(node parse.Node, isCut *bool) bool {
	if field, ok := node.(*parse.FieldNode); ok && slices.Contains(field.Ident, "Response") {
		*isCut = true
		return false
	}
	if *isCut {
		return false
	}
	switch one := node.(type) {
	case *parse.ListNode:
		var left []parse.Node
		for _, child := range one.Nodes {
			if cut(child, isCut) {
				left = append(left, child)
			}
		}
		one.Nodes = left
	case *parse.IfNode:
		cutBranch(&one.BranchNode, isCut)
	case *parse.RangeNode:
		cutBranch(&one.BranchNode, isCut)
	case *parse.WithNode:
		cutBranch(&one.BranchNode, isCut)
	case *parse.ActionNode:
		return cut(one.Pipe, isCut)
	case *parse.PipeNode:
		var left []*parse.CommandNode
		for _, command := range one.Cmds {
			var arguments []parse.Node
			for _, argument := range command.Args {
				if cut(argument, isCut) {
					arguments = append(arguments, argument)
				}
			}
			if len(arguments) == 0 {
				return false
			}
			command.Args = arguments
			left = append(left, command)
		}
		one.Cmds = left
		return len(left) > 0
	}
	return true
}

func cutBranch(node *parse.BranchNode, isCut *bool) {
	// a list that begins behind the cut is left, and is empty
	for _, list := range []*parse.ListNode{node.List, node.ElseList} {
		if list == nil {
			continue
		}
		if *isCut {
			list.Nodes = nil
		} else {
			cut(list, isCut)
		}
	}
}

func render(parsed *template.Template, row []message) (string, error) {
	var text strings.Builder
	system, messages := collate(row)
	known := map[string]bool{}
	for _, one := range parsed.Templates() {
		names(one.Root, known)
	}
	if known["messages"] {
		values := map[string]any{"System": system, "Messages": messages, "Response": "", "Tools": nil}
		err := parsed.Execute(&text, values)
		return text.String(), err
	}
	var prompt, response string
	system = ""
	values := func() map[string]any {
		return map[string]any{"System": system, "Prompt": prompt, "Response": response}
	}
	for _, one := range messages {
		isDone := one.Role == "system" && (prompt != "" || response != "") || one.Role == "user" && response != ""
		if isDone {
			if err := parsed.Execute(&text, values()); err != nil {
				return "", err
			}
			system, prompt, response = "", "", ""
		}
		switch one.Role {
		case "system":
			system = one.Content
		case "user":
			prompt = one.Content
		case "assistant":
			response = one.Content
		}
	}
	isCut, root := false, parsed.Root.CopyList()
	cut(root, &isCut)
	last, err := template.New("").Funcs(functions).AddParseTree("", &parse.Tree{Root: root})
	if err != nil {
		return "", err
	}
	err = last.Execute(&text, values())
	return text.String(), err
}

func parsed(source string) (*template.Template, error) {
	found, err := template.New("").Option("missingkey=zero").Funcs(functions).Parse(source)
	if err != nil {
		return nil, err
	}
	known := map[string]bool{}
	for _, one := range found.Templates() {
		names(one.Root, known)
	}
	if !known["messages"] && !known["response"] {
		return template.New("").Option("missingkey=zero").Funcs(functions).Parse(source + "{{ .Response }}")
	}
	return found, nil
}

func main() {
	var given struct {
		Template string
		Rows     [][]message
	}
	content, err := os.ReadFile(os.Args[1])
	if err == nil {
		err = json.Unmarshal(content, &given)
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(2)
	}
	answers := []answer{}
	source, err := parsed(given.Template)
	for _, row := range given.Rows {
		if err != nil {
			answers = append(answers, answer{Error: err.Error()})
			continue
		}
		text, failed := render(source, row)
		one := answer{Text: text}
		if failed != nil {
			one.Error = failed.Error()
		}
		answers = append(answers, one)
	}
	content, err = json.Marshal(answers)
	if err == nil {
		err = os.WriteFile(os.Args[2], content, 0o600)
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(2)
	}
}
