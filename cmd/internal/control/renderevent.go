package control

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"unicode/utf16"
)

// WriteEvent writes e as one line of text.
func WriteEvent(w io.Writer, e Event) error {
	var b strings.Builder
	b.WriteString(e.Time.Local().Format("15:04:05.000 "))
	switch {
	case e.Event == EventLost:
		fmt.Fprintf(&b, "%-11s %s events are missing here: they are read too slowly", Plain(e.Event), count(e.Lost))
	case e.Flow == nil:
		b.WriteString(Plain(e.Event))
	default:
		f := e.Flow
		fmt.Fprintf(
			&b,
			"%-11s %d %s %s %s -> %s",
			Plain(e.Event),
			f.ID,
			Plain(f.Proto),
			Plain(programOf(*f)),
			Plain(f.Src),
			Plain(destination(*f)),
		)
		if f.Upstream != "" {
			fmt.Fprintf(&b, " via %s", Plain(f.Upstream))
		}
		if e.Event != EventClosed {
			break
		}
		fmt.Fprintf(&b, " %s, %s up, %s down, %s", Plain(f.State), byteCount(f.Up), byteCount(f.Down), span(e.Time.Sub(f.Start)))
		if e.Error != "" {
			fmt.Fprintf(&b, ": %s", Plain(e.Error))
		}
	}
	b.WriteString("\n")
	_, err := io.WriteString(w, b.String())
	return err
}

// destination returns the destination of a flow: its name, if it has one, and its address.
func destination(f Flow) string {
	if f.Host != "" {
		return f.Host + " " + f.Dst
	}
	return f.Dst
}

// WriteJSONLine writes v as one line of JSON. Characters that Plain would replace are escaped.
func WriteJSONLine(w io.Writer, v any) error {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return err
	}
	_, err := io.WriteString(w, printableJSON(b.String()))
	return err
}

// printableJSON escapes the characters in JSON that Plain would replace, because the output may go to a terminal.
func printableJSON(text string) string {
	var out strings.Builder
	for _, r := range text { // outside strings, JSON is ASCII
		switch {
		case r == '\n' || strconv.IsPrint(r):
			out.WriteRune(r)
		case r > 0xffff:
			hi, lo := utf16.EncodeRune(r)
			fmt.Fprintf(&out, `\u%04x\u%04x`, hi, lo)
		default:
			fmt.Fprintf(&out, `\u%04x`, r)
		}
	}
	return out.String()
}
