package top

import (
	"errors"
	"fmt"
	"os"

	tea "charm.land/bubbletea/v2"
	"golang.org/x/sys/unix"
)

// Terminal is the terminal in which the view is shown.
type Terminal struct {
	In, Out *os.File
	Environ []string
}

const hint = "'viasocks flows --watch' prints lines, and 'viasocks status' a summary"

// check returns an error if the view cannot be shown there.
func (t Terminal) check() error {
	for _, f := range []struct {
		file *os.File
		what string
	}{{t.Out, "standard output"}, {t.In, "standard input"}} {
		if !isTerminal(f.file) {
			return fmt.Errorf("cannot show a live view: %s is not a terminal: %s", f.what, hint)
		}
	}
	if term := t.term(); term == "" || term == "dumb" {
		return fmt.Errorf("cannot show a live view: the terminal cannot move the cursor (TERM is %q): %s", term, hint)
	}
	return nil
}

// isTerminal reports whether f is a terminal, and not one that was hung up.
func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// term returns the type of the terminal.
func (t Terminal) term() (term string) {
	const name = "TERM="
	for _, e := range t.Environ {
		if len(e) >= len(name) && e[:len(name)] == name {
			term = e[len(name):]
		}
	}
	return term
}

// Run shows the view of s in the terminal until the user quits. If s does not answer the first question, Run returns
// the error. Later errors appear in the view, which asks again.
func Run(s Source, t Terminal) error {
	if err := t.check(); err != nil {
		return err
	}
	first, err := look(s)
	if err != nil {
		return err
	}
	m := &model{source: s, alone: func() bool { return !isTerminal(t.Out) }}
	m.take(answer{first, nil})
	_, err = tea.NewProgram(m, tea.WithInput(t.In), tea.WithOutput(t.Out), tea.WithEnvironment(t.Environ)).Run()
	if errors.Is(err, tea.ErrInterrupted) { // SIGINT; the view itself handles Ctrl-C
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot show a live view: %w", err)
	}
	return nil
}
