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

// Choose replaces this process with a program whose traffic goes the way for which ask asks the daemon. It returns
// only if it fails, with the exit status that a shell would use.
func Choose(ask func() error, program, environ []string) (exit int, err error) {
	fail := func(err error) (int, error) {
		exit := 126
		if errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
			exit = 127
		}
		return exit, fmt.Errorf("cannot run %s: %w", program[0], process.PlainPathError(err))
	}
	file, err := exec.LookPath(program[0])
	if err != nil {
		var e *exec.Error
		if errors.As(err, &e) {
			err = e.Err
		}
		return fail(err)
	}
	if err := ask(); err != nil {
		return 126, err
	}
	return fail(syscall.Exec(file, program, programEnv(environ, true)))
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
