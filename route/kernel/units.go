package kernel

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Unit is a unit of systemd whose processes go past the proxy, whether it runs or not.
type Unit struct {
	Name string  // NAME.service, .scope or .slice; NAME@.service: all instances
	User *uint32 // the user whose service manager runs it; nil: the system's
}

func (u Unit) String() string {
	if u.User != nil {
		return fmt.Sprintf("%d/%s", *u.User, u.Name)
	}
	return u.Name
}

// has reports whether a control group of this name is the unit's. systemd writes an underscore before a name that the
// kernel could take for one of its own files, such as memory.service.
func (u Unit) has(name string) bool {
	name = strings.TrimPrefix(name, "_")
	if before, after, ok := strings.Cut(u.Name, "@."); ok {
		return strings.HasPrefix(name, before+"@") && strings.HasSuffix(name, "."+after)
	}
	return name == u.Name
}

// Limits of a search for units: directories, and how deep slices may be.
const (
	maxSlices     = 4096
	maxSliceDepth = 16
)

// unitSearch looks for units among the control groups. It looks at slices only, and at the service manager of a user if
// a unit of that user is wanted. These are directories in which root alone can make others, or that user: whoever may
// make a control group elsewhere, such as the root of a container, cannot give it the name of a unit.
type unitSearch struct {
	mount string
	want  []Unit
	watch func(dir string) // before it is read, so that nothing is missed
	left  int
	found []liveGroup
}

func (s *unitSearch) dir(rel string, user *uint32, depth int) {
	if s.left--; s.left < 0 || depth > maxSliceDepth {
		return
	}
	full := filepath.Join(s.mount, rel)
	s.watch(full)
	entries, err := os.ReadDir(full)
	if err != nil {
		return // it ended meanwhile
	}
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		at := path.Join(rel, e.Name())
		for _, u := range s.want {
			if sameUser(u.User, user) && u.has(e.Name()) {
				s.add(at, u)
			}
		}
		switch manager := s.managerOf(rel, e.Name()); {
		case strings.HasSuffix(e.Name(), ".slice"):
			s.dir(at, user, depth+1)
		case user == nil && manager != nil:
			s.dir(at, manager, depth+1)
		}
	}
}

func sameUser(a, b *uint32) bool { return a == nil && b == nil || a != nil && b != nil && *a == *b }

// managerOf returns the user whose service manager the group is, if a unit of this user is wanted.
func (s *unitSearch) managerOf(rel, name string) *uint32 {
	for _, u := range s.want {
		if u.User == nil {
			continue
		}
		id := strconv.FormatUint(uint64(*u.User), 10)
		if rel == "user.slice/user-"+id+".slice" && name == "user@"+id+".service" {
			return u.User
		}
	}
	return nil
}

func (s *unitSearch) add(rel string, u Unit) {
	if cg, err := findCgroup(rel); err == nil {
		s.found = append(s.found, liveGroup{cg, ExcludeProgram, u.String()})
	}
}

// maxUnitGroups limits the control groups of units, because instances may be many.
const maxUnitGroups = 1024

// findUnits updates the groups of units in h.c.live, and reports whether they have changed.
func (h *Host) findUnits() bool {
	var s unitSearch
	if len(h.c.Units) > 0 {
		mount, err := cgroupMount()
		if err != nil {
			h.say("units", "cannot look for units of systemd: they go through the proxy", "why", err)
			return false
		}
		s = unitSearch{mount: mount, want: h.c.Units, left: maxSlices,
			watch: func(dir string) { h.notifyOf(dir, unix.IN_CREATE|unix.IN_DELETE|unix.IN_ONLYDIR) }}
		s.dir("", nil, 0)
		if s.left < 0 || len(s.found) > maxUnitGroups {
			s.found = s.found[:min(len(s.found), maxUnitGroups)]
			h.say("units",
				"there are more slices or units than viasocks looks at: some of the excluded units go through the proxy")
		}
	}
	isUnit := func(l liveGroup) bool { return l.unit != "" }
	var old []liveGroup
	for _, l := range h.c.live {
		if isUnit(l) {
			old = append(old, l)
		}
	}
	if slices.Equal(old, s.found) {
		return false
	}
	h.c.live = append(slices.DeleteFunc(slices.Clone(h.c.live), isUnit), s.found...)
	return true
}

// followUnits brings the filter up to date with the units that run. The caller holds h.mu.
func (h *Host) followUnits() {
	if !h.findUnits() {
		return
	}
	if err := h.syncLive(); err != nil {
		h.c.Log.Error("cannot tell the filter that an excluded unit has started or ended", "err", err)
	}
}
