package main

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/cmd/internal/conform"
)

const (
	serversBegin = ".\\\" servers begin\n"
	serversEnd   = ".\\\" servers end\n"
)

// The manual's tables of SOCKS servers are those that scripts/zoo.sh found.
func TestManualServers(t *testing.T) {
	b, err := os.ReadFile("viasocks.7")
	if err != nil {
		t.Fatal(err)
	}
	head, rest, ok := strings.Cut(string(b), serversBegin)
	list, tail, ok2 := strings.Cut(rest, serversEnd)
	if !ok || !ok2 {
		t.Fatal("the marks of the tables of servers are not there")
	}
	survey, err := conform.Servers()
	if err != nil {
		t.Fatal(err)
	}
	var want bytes.Buffer
	if err := survey.WriteMan(&want); err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile("viasocks.7", []byte(head+serversBegin+want.String()+serversEnd+tail), 0o644); err != nil {
			t.Fatal(err)
		}
	} else if list != want.String() {
		t.Error("the manual's tables of servers are not those of the survey: go test ./cmd/viasocks -run ManualServers -update")
	}
}
