package daemon

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"syscall"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/cmd/internal/owner"
	"github.com/viasocks/viasocks/cmd/internal/process"
)

// Exec replaces this process with a program in the namespaces of an instance of run, or in the network of one of attach.
// want is the name or process id of this instance, and all contains the instances of the caller, and of nobody else: another
// user could give his the same name, and have the caller's program run where it is not carried. Exec returns only if it
// fails, with the exit status that a shell would use.
//
// A process with several threads cannot enter a user namespace (setns(2)), and a Go program always has several.
// nsenter(1) does it.
func Exec(want string, program []string, all []control.Instance, environ []string) (exit int, err error) {
	fail := func(err error) (int, error) { return exitCannotRun, fmt.Errorf("cannot exec in %q: %w", want, err) }
	at, err := instanceNamed(want, all)
	if err != nil {
		return fail(err)
	}
	nsenter, err := exec.LookPath("nsenter")
	if err != nil {
		return fail(errors.New("nsenter is not installed: install util-linux"))
	}
	// The instance sees the same files, so that a missing program is found here. The message of nsenter would name nsenter.
	if _, exit, err := findProgram(program[0]); err != nil {
		return exit, err
	}
	args := []string{"nsenter", "--target", strconv.Itoa(at.Inside), "--net"}
	if at.Mode == control.ModeRun { // of what was attached to, only the network is another one
		args = append(args, "--mount")
	}
	if other, err := otherUserNamespace(at.Inside); err != nil {
		return fail(err)
	} else if other {
		if at.UID != os.Geteuid() {
			return fail(fmt.Errorf("it has a user namespace of its own: do it as %s", at.User))
		}
		args = append(args, "--user", "--preserve-credentials")
	}
	if dir, err := os.Getwd(); err == nil { // otherwise nsenter would change to the root directory
		args = append(args, "--wd="+dir)
	}
	args = append(append(args, "--"), program...)
	return fail(syscall.Exec(nsenter, args, programEnv(environ, false)))
}

// instanceNamed finds the instance of run or attach with this name or process id.
func instanceNamed(want string, all []control.Instance) (at control.Instance, err error) {
	pid, err := strconv.Atoi(want)
	if err != nil || pid == 0 { // 0 is a process of another PID namespace
		pid = -1
	}
	n, silent := 0, false
	for _, i := range all {
		if i.State == control.NoAnswer {
			if i.PID == pid {
				return at, errors.New("it does not answer: try again later, or see 'viasocks ps'")
			}
			silent = true
		}
		if i.Mode != control.ModeUp && i.Inside > 0 && (i.PID == pid || i.Name != "" && i.Name == want) {
			at = i
			n++
		}
	}
	switch {
	case n == 0 && silent: // its name is not known
		return at, errors.New("none of your own programs that answer has this name or process id: see 'viasocks ps'")
	case n == 0:
		return at, errors.New("none of your own programs has this name or process id: see 'viasocks ps'")
	case n > 1:
		return at, errors.New("several have this name: give the process id that 'viasocks ps' shows")
	case at.PID == 0: // its numbers of processes mean others here
		return at, errors.New("it is in another process namespace, such as that of a container: do it there")
	}
	// The process id belongs to the program, or to the process that attach has in the namespace, as long as its parent,
	// viasocks, has not waited for it.
	if owner.Parent(strconv.Itoa(at.Inside)) != strconv.Itoa(at.PID) {
		return at, errors.New("its program has ended")
	}
	return at, nil
}

// otherUserNamespace reports whether a process is in another user namespace than this one.
func otherUserNamespace(pid int) (bool, error) {
	theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/user", pid))
	if err != nil {
		return false, fmt.Errorf("cannot look at its program: %w", process.PlainPathError(err))
	}
	ours, err := os.Readlink("/proc/self/ns/user")
	if err != nil {
		return false, fmt.Errorf("cannot look at our own namespaces: %w", process.PlainPathError(err))
	}
	return theirs != ours, nil
}
