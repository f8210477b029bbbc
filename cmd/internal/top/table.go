package top

import (
	"strings"

	"github.com/charmbracelet/x/ansi"
)

// column is one of a table. The column with width 0 takes what the others leave.
type column struct {
	title string
	width int
	right bool // numbers
}

type columns []column

// nothing stands in a cell for what is not known, or does not move.
const nothing = "-"

type cell struct {
	text  string
	style ansi.Style
}

// widths gives each column its width in a table so wide. There is one cell before the first and between two.
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

// head is the line of titles, in a bar that is as wide as the view. sorted is the column that the table is sorted by; below 0: none.
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

// line is a row. Names that are too long for the column that takes the rest lose their middle.
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
