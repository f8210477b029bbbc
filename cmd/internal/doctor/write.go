package doctor

import (
	"fmt"
	"io"
	"strings"

	"github.com/viasocks/viasocks/cmd/internal/control"
)

// Columns of the text.
const (
	checkColumn = 13
	foundColumn = 29
	lastColumn  = 100
)

// WriteText writes r as text: a line for each finding and, below it, what it means and what to do.
func WriteText(w io.Writer, r *Report) error {
	b := new(strings.Builder)
	part := ""
	for i, f := range r.Findings {
		if f.Part != part {
			if i > 0 {
				b.WriteString("\n")
			}
			part = f.Part
			fmt.Fprintf(b, "%s\n", control.Plain(part))
		}
		head := fmt.Sprintf("  %-*s%-*s", checkColumn-2, f.Level, foundColumn-checkColumn, f.Check)
		wrap(b, head, f.Found)
		if f.Means != "" {
			wrap(b, "", f.Means)
		}
		if f.Do != "" {
			wrap(b, "", "-> "+f.Do)
		}
	}
	fmt.Fprintf(b, "\n%s, %s; %s not tested (%.1f s)\n",
		count(r.Faults, "fault"), count(r.Warnings, "warning"), count(r.NotTested, "thing"), r.Seconds)
	_, err := io.WriteString(w, b.String())
	return err
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// wrap writes head and, after it, text in lines that begin at foundColumn.
func wrap(b *strings.Builder, head, text string) {
	line := fmt.Sprintf("%-*s", foundColumn, control.Plain(head))
	if len(line) > foundColumn && !strings.HasSuffix(line, " ") {
		line += " "
	}
	empty := true
	for _, word := range strings.Fields(control.Plain(text)) {
		if !empty && len(line)+1+len(word) > lastColumn {
			b.WriteString(line + "\n")
			line, empty = strings.Repeat(" ", foundColumn), true
		}
		if !empty {
			line += " "
		}
		line += word
		empty = false
	}
	b.WriteString(strings.TrimRight(line, " ") + "\n")
}
