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
	return open(filepath.Join(namespaces, cfg.NetNS), "network namespace "+cfg.NetNS)
}

// ofProcess opens the network namespace of a process.
func ofProcess(pid int) (Target, error) {
	words := "process " + strconv.Itoa(pid)
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); err == nil {
		words += " (" + strings.TrimSpace(string(b)) + ")"
	}
	return open(fmt.Sprintf("/proc/%d/ns/net", pid), words)
}

func open(path, words string) (Target, error) {
	n, err := netns.OpenNamespace(path)
	switch {
	case errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH):
		return Target{}, fmt.Errorf("cannot use the %s: there is none", words)
	case errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM):
		return Target{}, fmt.Errorf(
			"cannot use the %s: %w: it belongs to another user: run viasocks as root, or as that user", words, err)
	case err != nil:
		return Target{}, fmt.Errorf("cannot use the %s: %w", words, err)
	case n.OfCaller():
		n.Close()
		return Target{}, fmt.Errorf(
			"cannot use the %s: it is in the network namespace of viasocks itself: use 'viasocks up' and 'down'", words)
	}
	return Target{n, words}, nil
}
