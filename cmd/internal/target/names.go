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

// nameRE is the name of a container as engines allow it; those of Kubernetes may have the namespace of the pod before them.
var nameRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,254}(/[A-Za-z0-9][A-Za-z0-9_.-]{0,254})?$`)

// system is where containers are looked for.
type system struct {
	proc     string // /proc
	machines string // /run/systemd/machines
	euid     int
	network  func(pid int) network
	missed   error // why something could not be read, the first time
	hidden   bool  // because the caller may not
}

func (s *system) miss(err error) {
	if s.missed == nil {
		s.missed = err
	}
	s.hidden = s.hidden || errors.Is(err, fs.ErrPermission)
}

// thisSystem is where the process runs.
func thisSystem() *system {
	return &system{proc: "/proc", machines: "/run/systemd/machines", euid: os.Geteuid(), network: networkOf}
}

// network is what matters of a process's network namespace.
type network struct {
	id    netns.ID
	owner int  // user id of who made it; -1: it cannot be found out
	own   bool // viasocks is in it
}

func networkOf(pid int) network {
	n, err := netns.OpenNamespace(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return network{owner: -1}
	}
	defer n.Close()
	return network{n.ID(), n.Owner(), n.OfCaller()}
}

// A container is one that runs. What anybody can make up, such as the name of a control group or the arguments of a process,
// must not lead to somebody else's network: what claims to be one container, but is in networks of several users, is
// several containers.
type container struct {
	key
	engine string   // "": it is not known
	names  []string // none: only the id is known
	first  *running
	net    network // of first
}

// key distinguishes containers.
type key struct {
	id    string // as engines have it, NAMESPACE/NAME of ctr's containers, the control group of LXC's; "": a machine of systemd
	owner int    // of its network
	own   bool   // its network is that of viasocks
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

// addMonitored adds the container of a conmon, or its name. Its child is in the container's control group, or in conmon's own
// where the container has none.
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

// rank is the higher, the less a container is what the caller can have meant: his own and root's come before those of others.
func (s *system) rank(c *container) int {
	switch {
	case c.own:
		return 2
	case s.trusts(c.owner):
		return 0
	}
	return 1
}

// find returns the container with the name or id want, or whose id begins so.
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

// choose returns the one of several containers that is meant. All those of a pod have one network, so that each will do.
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

// String is for messages.
func (c *container) String() string {
	words := strings.TrimSpace(c.engine + " " + c.id)
	if len(c.names) > 0 {
		words += " (" + strings.Join(c.names, ", ") + ")"
	}
	return words
}

// none is the error when no container was found.
func (s *system) none(processes int, all []*container) error {
	where := fmt.Sprintf("no running container has that name or an id that begins so, among %d (viasocks looked at the "+
		"control groups of %d processes, at conmon, containerd-shim, lxc-start and systemd-nspawn, and in %s)",
		len(all), processes, s.machines)
	var named []*container
	for _, c := range all {
		if len(c.names) > 0 {
			named = append(named, c)
		}
	}
	switch {
	case s.hidden && s.euid != 0:
		where += ": the names that docker, containerd and systemd-nspawn keep can be read by root only: run viasocks as root, " +
			"or give the id"
	case s.missed != nil:
		where += ": not all names could be read: " + s.missed.Error()
	case len(named) > 0:
		where += ": there are " + list(named, func(c *container) string { return c.names[len(c.names)-1] })
	default:
		where += ": 'docker ps' or 'podman ps' shows what runs; --pid takes a process of any container"
	}
	return errors.New(where)
}

// maxCandidates is how many containers an error names.
const maxCandidates = 8

// list is for messages.
func list(all []*container, words func(*container) string) string {
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
	if err == nil && c.net.id != (netns.ID{}) && t.ID() != c.net.id { // another process got the number meanwhile
		t.Close()
		return Target{}, fmt.Errorf("cannot use the container %s: it has just ended", want)
	}
	return t, err
}
