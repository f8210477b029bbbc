package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/cmd/internal/process"
	"github.com/viasocks/viasocks/route/kernel"
)

// choose moves the process that asked into a control group whose traffic goes the chosen way.
func (u *up) choose(c kernel.Choice) func(control.Process) error {
	return func(p control.Process) error {
		_, h := u.running()
		if h == nil {
			return errors.New("the host is not steered yet: see 'viasocks status'")
		}
		return h.Choose(p.PID, c, p.Alive)
	}
}

// Choose replaces this process with a program. ask asks the daemon to treat the traffic of this process, and so of the
// program, in the chosen way. Choose returns only if it fails, with the exit status that a shell would use.
func Choose(ask func() error, program, environ []string) (exit int, err error) {
	file, exit, err := findProgram(program[0])
	if err != nil {
		return exit, err
	}
	if err := ask(); err != nil {
		return exitCannotRun, err
	}
	return cannotRun(program[0], syscall.Exec(file, program, programEnv(environ, true)))
}

// The exit statuses that a shell uses for a program that cannot be run and for one that does not exist.
const exitCannotRun, exitNoProgram = 126, 127

// findProgram looks a program up in $PATH. With an error, exit is the exit status for it.
func findProgram(name string) (file string, exit int, err error) {
	file, err = exec.LookPath(name)
	if err != nil {
		var e *exec.Error
		if errors.As(err, &e) {
			err = e.Err
		}
		exit, err = cannotRun(name, err)
	}
	return file, exit, err
}

// cannotRun returns the error that says why a program cannot be run, and the exit status for it.
func cannotRun(name string, why error) (exit int, err error) {
	exit = exitCannotRun
	if errors.Is(why, exec.ErrNotFound) || errors.Is(why, fs.ErrNotExist) {
		exit = exitNoProgram
	}
	return exit, fmt.Errorf("cannot run %s: %w", name, process.PlainPathError(why))
}

// programLines describes the programs and units whose traffic goes a chosen way.
func programLines(all []kernel.Program, c kernel.Choice) (lines []string) {
	for _, p := range all {
		if p.Choice != c {
			continue
		}
		line := "of unit " + p.Unit + ", which runs in control group " + p.Group
		if p.Unit == "" {
			line = "of a program in control group " + p.Group
			if len(p.PIDs) > 0 {
				line = "of program " + commandOf(p.PIDs[0])
			}
		}
		lines = append(lines, line+processWords(p.PIDs))
	}
	return lines
}

// commandOf returns the name of the executable of a process, or what stands for it.
func commandOf(pid int) string {
	if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); err == nil {
		return filepath.Base(exe)
	}
	return "?"
}

func processWords(pids []int) string {
	switch len(pids) {
	case 0:
		return ""
	case 1:
		return fmt.Sprintf(", process %d", pids[0])
	}
	words := make([]string, len(pids))
	for i, p := range pids {
		words[i] = strconv.Itoa(p)
	}
	return ", processes " + strings.Join(words, " ")
}
