// Package target finds the network namespace that the user means: that of a process or
// a container, or a named one.
package target

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/tun/netns"
)

// A Target is a network namespace that was found.
type Target struct {
	*netns.Namespace
	Words string // what the user named, for messages
}

// Namespaces is the directory in which ip-netns(8) keeps the names.
const namespaces = "/run/netns"

// Find opens the network namespace that cfg names.
func Find(cfg *config.Config) (Target, error) {
	if cfg.PID != 0 {
		return ofProcess(cfg.PID)
	}
	if cfg.Container != "" {
		return ofContainer(cfg.Container)
	}
	t, err := open(filepath.Join(namespaces, cfg.NetNS), "network namespace "+cfg.NetNS)
	if errors.Is(err, errNone) {
		err = fmt.Errorf("%w: 'ip netns list' shows those that there are", err)
	}
	return t, err
}

// errNone means that what the user named does not exist.
var errNone = errors.New("there is none")

// ofProcess opens the network namespace of a process.
func ofProcess(pid int) (Target, error) {
	words := "process " + strconv.Itoa(pid)
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); err == nil {
		words += " (" + strings.TrimSpace(string(b)) + ")"
	}
	return open(fmt.Sprintf("/proc/%d/ns/net", pid), words)
}

// refusedTo says why the user uid may not look at a process.
func refusedTo(uid int) string {
	if uid != 0 {
		return "it belongs to another user: run viasocks as root, or as that user"
	}
	return "it has privileges that viasocks does not have: CAP_SYS_PTRACE is missing, or a security module forbids it"
}

func open(path, words string) (Target, error) {
	n, err := netns.OpenNamespace(path)
	switch {
	case errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH):
		return Target{}, fmt.Errorf("cannot use the %s: %w", words, errNone)
	case errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM):
		return Target{}, fmt.Errorf("cannot use the %s: %w: %s", words, err, refusedTo(os.Geteuid()))
	case err != nil:
		return Target{}, fmt.Errorf("cannot use the %s: %w", words, err)
	case n.OfCaller():
		n.Close()
		is := "is in"
		if strings.HasPrefix(words, "network namespace ") {
			is = "is"
		}
		return Target{}, fmt.Errorf(
			"cannot use the %s: it %s the network namespace of viasocks itself: use 'viasocks up' and 'down'", words, is)
	}
	return Target{n, words}, nil
}
