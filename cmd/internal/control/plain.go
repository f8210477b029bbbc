package control

import (
	"encoding/json"
	"io"
	"strconv"
	"strings"
)

// Plain returns s as one line for a terminal. It replaces control characters, and characters that change the reading
// order of the line. Names, arguments and messages of proxies or the kernel come from others, so everything that is
// printed passes through here; the log quotes such values itself.
func Plain(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return ' '
		case !strconv.IsPrint(r):
			return '?'
		}
		return r
	}, s)
}

// WriteJSON writes v as indented JSON. It escapes what Plain would replace, because the output may go to a terminal.
func WriteJSON(w io.Writer, v any) error {
	var b strings.Builder
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(v); err != nil {
		return err
	}
	_, err := io.WriteString(w, printableJSON(b.String()))
	return err
}
