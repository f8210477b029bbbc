package target

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/viasocks/viasocks/tun/netns"
)

// nameRE matches the names that engines allow for containers, and the name of a pod with or without its namespace before it.
var nameRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,254}(/[A-Za-z0-9][A-Za-z0-9_.-]{0,254})?$`)

// system is the place in which containers are looked for. Tests have their own.
type system struct {
	proc     string // /proc
	machines string // /run/systemd/machines
	euid     int
	network  func(pid int) network
	missed   error // the first reason why something could not be read; nil: there is none
	hidden   bool  // the caller may not read something
}

// miss notes that something could not be read.
func (s *system) miss(err error) {
	if s.missed == nil {
		s.missed = err
	}
	s.hidden = s.hidden || errors.Is(err, fs.ErrPermission)
}

// thisSystem returns the system on which viasocks runs.
func thisSystem() *system {
	return &system{proc: "/proc", machines: "/run/systemd/machines", euid: os.Geteuid(), network: networkOf}
}

// network is the network namespace of a process.
type network struct {
	id    netns.ID // zero: it cannot be found out
	owner int      // see netns.Namespace.Owner; -1: it cannot be found out
	own   bool     // viasocks is in it
}

func networkOf(pid int) network {
	n, err := netns.OpenNamespace(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return network{owner: -1}
	}
	defer n.Close()
	return network{n.ID(), n.Owner(), n.OfCaller()}
}

// container is a container that runs. Any user can invent the name of a control group or the arguments of a process. That must
// not lead to another user's network, so that processes with one id in networks of several users are several containers.
type container struct {
	key
	engine string   // "": unknown
	names  []string // none: only the id is known
	first  *running // its process that was started first
	net    network  // the network of first
}

// key distinguishes containers.
type key struct {
	id    string // the engine's id; with ctr NAMESPACE/ID, with LXC the control group; "": a machine of systemd
	owner int    // owner of its network
	own   bool   // viasocks is in its network
}

// containers returns the containers on this host: those with a control group, and those with a monitor.
func (s *system) containers(all map[int]*running) []*container {
	found := map[key]*container{}
	var list []*container
	for _, p := range all {
		if p.id != "" {
			s.add(found, p.id, p)
			continue
		}
		switch parent := all[p.parent]; {
		case parent == nil:
		case s.isShim(parent):
			s.addNamed(found, parent, p)
		case parent.comm == "systemd-nspawn" && parent.id == "" && s.trusts(parent.uid):
			if name := s.mountedName(p.pid); name != "" {
				list = append(list, s.machineOf(name, p))
			}
		}
	}
	for _, p := range all {
		switch {
		case p.comm == "conmon":
			s.addMonitored(found, all, p)
		case strings.HasPrefix(p.comm, "lxc-"):
			s.addLXC(found, all, p)
		}
	}
	for _, c := range found {
		switch parent := all[c.first.parent]; {
		case c.engine != "":
		case c.first.inLXC():
			c.engine, c.names = "LXC", s.lxcNames(c.id, parent)
		case parent != nil:
			c.engine, c.names = s.shimmed(c.id, parent)
		}
		list = append(list, c)
	}
	slices.SortFunc(list, func(a, b *container) int { return cmp.Compare(a.id, b.id) })
	return list
}

// add notes that a process is in a container.
func (s *system) add(found map[key]*container, id string, p *running) *container {
	n := s.network(p.pid)
	k := key{id, n.owner, n.own}
	c := found[k]
	if c == nil {
		c = &container{key: k, first: p, net: n}
		found[k] = c
	} else if p.before(c.first) {
		c.first, c.net = p, n
	}
	return c
}

// addMonitored adds the container of a conmon, or the name of a container that was found before. The child of a conmon is in
// the container's control group, or in that of the conmon if the container has none.
func (s *system) addMonitored(found map[key]*container, all map[int]*running, conmon *running) {
	b, _ := readSome(filepath.Join(s.proc, strconv.Itoa(conmon.pid), "cmdline"), maxCmdline)
	id, name, ok := monitor(b)
	if !ok {
		return
	}
	for _, p := range all {
		if p.parent != conmon.pid || p.id != id && p.id != conmon.id {
			continue
		}
		c := s.add(found, id, p)
		c.names, c.engine = namesOf(name), "podman"
		if len(c.names) > 1 {
			c.engine = "CRI-O"
		}
	}
}

// rank returns 0 for a container of the caller or of root, 1 for one of another user, and 2 for one whose network is that of
// viasocks. The lower the rank, the more likely the caller means this container.
func (s *system) rank(c *container) int {
	switch {
	case c.own:
		return 2
	case s.trusts(c.owner):
		return 0
	}
	return 1
}

// find returns the container whose name or id is want. If there is none, it returns the one whose id begins with want.
func (s *system) find(want string) (*container, error) {
	all := s.processes()
	list := s.containers(all)
	var found []*container
	for _, c := range list {
		if c.id == want || slices.Contains(c.names, want) {
			found = append(found, c)
		}
	}
	if p := s.machine(want, all); p != nil {
		found = append(found, s.machineOf(want, p))
	}
	what := "that name"
	if len(found) == 0 {
		what = "an id that begins so"
		for _, c := range list {
			if idRE.MatchString(c.id) && strings.HasPrefix(c.id, want) {
				found = append(found, c)
			}
		}
	}
	if len(found) == 0 {
		return nil, s.none(len(all), list)
	}
	return s.choose(found, what)
}

// choose returns the container of the lowest rank. If several have it, they must have one network, as those of a pod do; any of
// them will do then.
func (s *system) choose(found []*container, what string) (*container, error) {
	best := slices.MinFunc(found, func(a, b *container) int { return cmp.Compare(s.rank(a), s.rank(b)) })
	found = slices.DeleteFunc(found, func(c *container) bool { return s.rank(c) > s.rank(best) })
	for _, c := range found {
		if c.net.id != best.net.id {
			all := list(found, (*container).String)
			return nil, fmt.Errorf("several have %s: %s: give the id of one, or more of it", what, all)
		}
		if c.first.before(best.first) {
			best = c
		}
	}
	return best, nil
}

// String describes the container in messages.
func (c *container) String() string {
	words := strings.TrimSpace(c.engine + " " + c.id)
	if len(c.names) > 0 {
		words += " (" + strings.Join(c.names, ", ") + ")"
	}
	return words
}

// none returns the error for a container that was not found. It says where viasocks looked and what there is.
func (s *system) none(processes int, all []*container) error {
	where := fmt.Sprintf("no running container has that name or an id that begins so, among %d (viasocks looked at the "+
		"control groups of %d processes, at conmon, containerd-shim, lxc-start and systemd-nspawn, and in %s)",
		len(all), processes, s.machines)
	var names []string // the containers of a pod have one name
	for _, c := range all {
		if len(c.names) > 0 && !slices.Contains(names, c.names[len(c.names)-1]) {
			names = append(names, c.names[len(c.names)-1])
		}
	}
	switch {
	case s.hidden && s.euid != 0:
		where += ": the names that docker, containerd and systemd-nspawn keep can be read by root only: run viasocks as root, " +
			"or give the id"
	case s.missed != nil:
		where += ": not all names could be read: " + s.missed.Error()
	case len(names) > 0:
		where += ": there are " + list(names, func(name string) string { return name })
	default:
		where += ": 'docker ps' or 'podman ps' shows what runs; --pid takes a process of any container"
	}
	return errors.New(where)
}

// maxCandidates is the number of containers that an error names at most.
const maxCandidates = 8

// list lists containers, or their names, in messages. words describes one of them.
func list[C any](all []C, words func(C) string) string {
	var text []string
	for _, c := range all[:min(len(all), maxCandidates)] {
		text = append(text, words(c))
	}
	if len(all) > maxCandidates {
		text = append(text, "and others")
	}
	return strings.Join(text, ", ")
}

// ofContainer opens the network namespace of a container.
func ofContainer(want string) (Target, error) {
	c, err := thisSystem().find(want)
	if err != nil {
		return Target{}, fmt.Errorf("cannot use the container %s: %w", want, err)
	}
	t, err := open(fmt.Sprintf("/proc/%d/ns/net", c.first.pid), "container "+want)
	if err == nil && c.net.id != (netns.ID{}) && t.ID() != c.net.id { // another process has got the id meanwhile
		t.Close()
		return Target{}, fmt.Errorf("cannot use the container %s: it has just ended", want)
	}
	return t, err
}
