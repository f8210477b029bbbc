package kernel

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// openInotify is a variable so that tests can simulate a host without it.
var openInotify = func() (*os.File, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "inotify"), nil
}

// watchGroup has the watch told when the last process of a group ends. Without inotify, renew looks from time to time.
func (h *Host) watchGroup(mount string, g Group) {
	h.notifyOf(filepath.Join(mount, g.Path, "cgroup.events"), unix.IN_MODIFY)
}

// notifyOf adds a watch for a path.
func (h *Host) notifyOf(path string, mask uint32) {
	if h.inotify == nil {
		return
	}
	raw, err := h.inotify.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) { _, err = unix.InotifyAddWatch(int(fd), path, mask) })
	if err != nil && !errors.Is(err, unix.ENOENT) {
		h.say("inotify", "cannot watch control groups: they are looked at every few seconds", "why", err)
	}
}

// followGroups calls news whenever something has happened to a control group, until the file is closed or ctx ends.
func (h *Host) followGroups(ctx context.Context, news func()) {
	if h.inotify == nil {
		return
	}
	buf := make([]byte, 16<<10)
	for ctx.Err() == nil {
		if _, err := h.inotify.Read(buf); err != nil { // what happened is seen by looking at the groups
			return
		}
		news()
	}
}

// lookAtGroups brings everything up to date that depends on control groups.
func (h *Host) lookAtGroups() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.shut || h.closed {
		return
	}
	h.sweepPrograms()
	h.followUnits()
}
