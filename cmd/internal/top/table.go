package top

import (
	"strings"

	"github.com/charmbracelet/x/ansi"
)

// column is a column of a table. The column with width 0 takes the rest of the line.
type column struct {
	title string
	width int
	right bool // numbers
}

type columns []column

// nothing is shown in a cell for a value that is unknown or zero.
const nothing = "-"

type cell struct {
	text  string
	style ansi.Style
}

// widths gives each column its width in a table of this width. There is one empty cell before the first column and
// between two columns.
func (c columns) widths(width int) []int {
	all := make([]int, len(c))
	rest := width - len(c) - 1
	for i := range c {
		all[i] = c[i].width
		rest -= c[i].width
	}
	for i := range c {
		if c[i].width == 0 {
			all[i] = max(rest, 1)
		}
	}
	return all
}

// head returns the line of titles, as a bar over the whole width. sorted is the column by which the table is sorted;
// negative: none.
func (c columns) head(width, bar, sorted int, reverse bool) string {
	var b strings.Builder
	for i, w := range c.widths(width) {
		title := c[i].title
		if i == sorted {
			mark := "▼"
			if reverse {
				mark = "▲"
			}
			title += mark
		}
		b.WriteString(" ")
		if c[i].right {
			b.WriteString(fitRight(title, w))
		} else {
			b.WriteString(fit(title, w))
		}
	}
	return styled(titles, fit(b.String(), bar))
}

// line returns a row. In the column that takes the rest, names that are too long lose their middle.
func (c columns) line(width int, cells []cell) string {
	var b strings.Builder
	for i, w := range c.widths(width) {
		text := cells[i].text
		switch {
		case c[i].right:
			text = fitRight(text, w)
		case c[i].width == 0:
			text = fitName(text, w)
		default:
			text = fit(text, w)
		}
		style := cells[i].style
		if cells[i].text == nothing {
			style = dim
		}
		b.WriteString(" " + styled(style, text))
	}
	return b.String()
}
