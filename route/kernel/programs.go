package kernel

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Choice tells which way the traffic of a program goes that was chosen while the host is steered.
type Choice string

// The values of Choice. ExcludeProgram: past the proxy. IncludeProgram: as if there were neither Exclude nor Include.
const (
	ExcludeProgram Choice = "exclude"
	IncludeProgram Choice = "include"
)

// Group is a control group that was made for a program, as the journal has it.
type Group struct {
	Path   string `json:"path"`         // below the cgroup2 mount
	Home   string `json:"home"`         // where the program came from
	ID     uint64 `json:"id,omitempty"` // its inode; 0: it was about to be made
	Choice Choice `json:"choice"`
}

// maxPrograms limits the control groups that exist for programs at the same time.
const maxPrograms = 256

// errEnded means that a process ended while its control group was made.
var errEnded = errors.New("the process has ended")

// Choose makes a control group for a process and moves the process into it. When it returns, the filter and the ip rules
// know the group; the process's children join it, and it is removed when its last process has ended. alive tells whether
// the process is still the one that is meant.
//
// The group is made inside the one in which the process is, or inside the nearest one above that belongs to root: the
// limits of its service or session still hold for it, or those of its user, and it ends with them. A program that was
// already chosen leaves its former group for the new one. An error says only why, because the caller knows what it asked for.
func (h *Host) Choose(pid int, c Choice, alive func() bool) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.shut || !h.steered || h.closed {
		return errors.New("the host is not steered yet")
	}
	h.sweepPrograms()
	if len(h.j.Groups) >= maxPrograms {
		return fmt.Errorf("there are %d others: wait until one ends", maxPrograms)
	}
	mount, err := cgroupMount()
	if err != nil {
		return err
	}
	home, err := homeOf(pid)
	if err != nil {
		return err
	}
	name := filepath.Join(ofRoot(mount, home), h.groupPrefix()+string(c)+"-"+strconv.Itoa(pid))
	g := Group{Path: freeName(mount, name), Home: home, Choice: c}
	if err := h.makeGroup(mount, &g); err != nil {
		return errors.Join(err, h.dropGroup(mount, g))
	}
	err = moveInto(mount, g.Path, pid)
	if err == nil && !alive() { // another process may have got its number
		err = errors.Join(errEnded, emptyGroup(mount, g))
	}
	if err != nil {
		return errors.Join(err, h.dropGroup(mount, g))
	}
	h.watchGroup(mount, g)
	return nil
}

// groupPrefix begins the names of our groups. Daemons of several network namespaces may share the tree.
func (h *Host) groupPrefix() string {
	ns, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(h.path), "host-"), "-")
	return "viasocks-" + ns + "-"
}

// isProgramGroup reports whether a path is that of a group that Choose makes.
func isProgramGroup(path string) bool {
	rest, ok := strings.CutPrefix(filepath.Base(path), "viasocks-")
	parts := strings.Split(rest, "-")
	return ok && len(parts) >= 3 && (Choice(parts[1]) == ExcludeProgram || Choice(parts[1]) == IncludeProgram)
}

// freeName returns path, or path with a number behind it if there is such a group.
func freeName(mount, path string) string {
	for n := 1; ; n++ {
		name := path
		if n > 1 {
			name += "-" + strconv.Itoa(n)
		}
		if _, err := os.Lstat(filepath.Join(mount, name)); err != nil {
			return name
		}
	}
}

// homeOf returns the control group of a process, below the mount, without the part that Choose has added.
func homeOf(pid int) (string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return "", errEnded
	}
	for line := range strings.Lines(string(b)) {
		path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::/")
		if !ok {
			continue
		}
		if path == ".." || strings.HasPrefix(path, "../") {
			return "", errors.New("its control group is outside of what viasocks sees: viasocks runs in a container")
		}
		if isProgramGroup("/" + path) {
			path = filepath.Dir("/" + path)
		}
		return strings.Trim(path, "/"), nil
	}
	return "", errors.New("it is in no control group of version 2")
}

// ofRoot returns path, or the nearest group above that belongs to root. A user cannot remove what root makes there, and
// without CAP_DAC_OVERRIDE root can make nothing in groups of users.
func ofRoot(mount, path string) string {
	for path != "" && path != "." {
		var st unix.Stat_t
		if unix.Stat(filepath.Join(mount, path), &st) == nil && st.Uid == 0 {
			return path
		}
		path = filepath.Dir(path)
	}
	return ""
}

// makeGroup records the group, makes it and tells the filter. It fills in the group's ID.
func (h *Host) makeGroup(mount string, g *Group) error {
	h.j.Groups = append(h.j.Groups, *g)
	if err := h.record(); err != nil {
		return err
	}
	if err := step(); err != nil {
		return err
	}
	dir := filepath.Join(mount, g.Path)
	if err := os.Mkdir(dir, 0o755); err != nil {
		err = fmt.Errorf("no control group can be made in %s: %w", filepath.Dir(dir), errors.Unwrap(err))
		if errors.Is(err, unix.EROFS) {
			err = fmt.Errorf("%w: the service of viasocks needs ProtectControlGroups=no", err)
		}
		return err
	}
	cg, err := findCgroup(g.Path)
	if err != nil {
		return err
	}
	g.ID = cg.id
	h.j.Groups[len(h.j.Groups)-1] = *g
	if err := h.record(); err != nil { // without the ID, another daemon would not take the group over
		return err
	}
	h.c.live = append(h.c.live, liveGroup{cg, g.Choice, ""})
	return h.syncLive()
}

// dropGroup forgets a group and removes it if it is empty.
func (h *Host) dropGroup(mount string, g Group) error {
	err := rmGroup(mount, g.Path)
	if err != nil {
		return err
	}
	h.j.Groups = slices.DeleteFunc(h.j.Groups, func(o Group) bool { return o.Path == g.Path })
	h.c.live = slices.DeleteFunc(h.c.live, func(l liveGroup) bool { return l.unit == "" && l.path == g.Path })
	return errors.Join(h.syncLive(), h.record())
}

// rmGroup removes an empty group.
func rmGroup(mount, path string) error {
	if err := step(); err != nil {
		return err
	}
	if err := unix.Rmdir(filepath.Join(mount, path)); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("the control group %s can't be removed: %w", path, err)
	}
	return nil
}

func moveInto(mount, path string, pid int) error {
	if err := step(); err != nil {
		return err
	}
	file := filepath.Join(mount, path, "cgroup.procs")
	err := os.WriteFile(file, []byte(strconv.Itoa(pid)), 0)
	switch {
	case errors.Is(err, unix.ESRCH):
		return errEnded
	case err != nil:
		return fmt.Errorf("the process can't be moved to the control group %s: %w", path, errors.Unwrap(err))
	}
	return nil
}

// maxMoves limits how often emptyGroup looks for processes that were started meanwhile.
const maxMoves = 64

// emptyGroup moves the processes of a group to where the program came from or, if that has ended, to the group above.
func emptyGroup(mount string, g Group) error {
	path := g.Path
	for range maxMoves {
		b, err := os.ReadFile(filepath.Join(mount, path, "cgroup.procs"))
		if err != nil || len(b) == 0 {
			return nil // there is no such group any more, or it is empty
		}
		for _, word := range strings.Fields(string(b)) {
			pid, err := strconv.Atoi(word)
			if err != nil || pid == 0 {
				return fmt.Errorf("a process of the control group %s is not visible here", path)
			}
			err = moveInto(mount, g.Home, pid)
			if err != nil && !errors.Is(err, errEnded) {
				err = moveInto(mount, filepath.Dir(path), pid)
			}
			if err != nil && !errors.Is(err, errEnded) {
				return err
			}
		}
	}
	return fmt.Errorf("the control group %s gets new processes again and again", path)
}

// populated reports whether a group has a process.
func populated(mount, path string) bool {
	b, err := os.ReadFile(filepath.Join(mount, path, "cgroup.events"))
	return err == nil && strings.Contains(string(b), "populated 1")
}

// sweepPrograms removes the groups whose last process has ended. The caller holds h.mu.
func (h *Host) sweepPrograms() {
	mount, err := cgroupMount()
	if err != nil {
		return
	}
	for _, g := range slices.Clone(h.j.Groups) {
		if populated(mount, g.Path) {
			continue
		}
		if err := h.dropGroup(mount, g); err != nil {
			h.say("group "+g.Path, "cannot remove the control group of a program that has ended", "err", err)
		}
	}
}

// adoptPrograms takes over the groups of a dead daemon. A group that somebody has made in place of one of these has
// another ID.
func (h *Host) adoptPrograms(old *journal) {
	mount, err := cgroupMount()
	if err != nil {
		return
	}
	for _, g := range old.Groups {
		cg, err := findCgroup(g.Path)
		if err != nil {
			continue
		}
		h.j.Groups = append(h.j.Groups, g)
		if cg.id == g.ID {
			h.c.live = append(h.c.live, liveGroup{cg, g.Choice, ""})
			h.watchGroup(mount, g)
		}
	}
}

// releasePrograms removes all groups. Programs that still run go on in the groups where these were made.
func (h *Host) releasePrograms() (removed []string, err error) {
	mount, err := cgroupMount()
	if err != nil && len(h.j.Groups) > 0 {
		return nil, err
	}
	var errs []error
	for _, g := range h.j.Groups {
		cg, err := findCgroup(g.Path)
		if err != nil || g.ID != 0 && cg.id != g.ID {
			continue // it has ended, and what is there now is not ours
		}
		if g.ID != 0 { // otherwise no process was moved into it
			err = emptyGroup(mount, g)
		}
		if err != nil && errors.Is(err, unix.EACCES) { // in a service without CAP_DAC_OVERRIDE; it does no harm there
			h.c.Log.Warn("the control group of a program stays: remove the directory when the program has ended", "err", err)
			continue
		}
		if err = errors.Join(err, rmGroup(mount, g.Path)); err != nil {
			errs = append(errs, err)
			continue
		}
		removed = append(removed, "control group "+g.Path)
	}
	h.c.live = slices.DeleteFunc(h.c.live, func(l liveGroup) bool { return l.unit == "" })
	return removed, errors.Join(errs...)
}

// Program is a control group whose traffic goes another way than the configuration says.
type Program struct {
	Group  string
	Choice Choice
	Unit   string // the unit of systemd; "": a program that was chosen by Choose
	PIDs   []int  // its processes, at most maxPIDs of them
}

const maxPIDs = 16

// Programs returns the programs that were chosen while the host is steered, and the units that run.
func (h *Host) Programs() (out []Program) {
	h.mu.Lock()
	live := slices.Clone(h.c.live)
	h.mu.Unlock()
	mount, err := cgroupMount()
	if err != nil {
		return nil
	}
	for _, l := range live {
		p := Program{Group: l.path, Choice: l.choice, Unit: l.unit}
		b, _ := os.ReadFile(filepath.Join(mount, l.path, "cgroup.procs"))
		for _, word := range strings.Fields(string(b)) {
			if pid, err := strconv.Atoi(word); err == nil && len(p.PIDs) < maxPIDs {
				p.PIDs = append(p.PIDs, pid)
			}
		}
		out = append(out, p)
	}
	return out
}
