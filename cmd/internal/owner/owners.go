package owner

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/viasocks/viasocks/route/kernel"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/tun/netns"
)

// Finder finds the owners of sockets: sock_diag returns the user, the control group and the inode of a socket, and
// /proc the process that has this inode open. It first checks the processes that had the last sockets, and reads
// all of /proc only for the rest. It must be used by one goroutine at a time.
type Finder struct {
	diag ownerSource

	sockets map[uint32]holder // by inode
	cgroups map[uint64]string // paths by inode
	recent  []string          // processes that had sockets, most recent first
}

// ownerSource is the part of netns.Diag that is needed.
type ownerSource interface {
	Owner(proto uint8, src, dst netip.AddrPort) (o netns.Owner, found bool, err error)
}

// holder is a process that had a socket open at a certain time.
type holder struct {
	pid int
	exe string
	at  time.Time
}

const (
	// holderAge is how long a socket is assumed to belong to the same program, because sockets may be passed on.
	holderAge = 10 * time.Second
	// Limits of what is remembered. What exceeds them is forgotten and looked up again.
	maxHolders, maxCgroupPaths, maxRecent = 4096, 1024, 16
)

// NewFinder returns a Finder that asks diag, which the caller closes.
func NewFinder(diag *netns.Diag) *Finder {
	return &Finder{diag: diag, sockets: map[uint32]holder{}, cgroups: map[uint64]string{}}
}

// OwnersOf implements flow.Owners.
func (p *Finder) OwnersOf(flows []flow.Flow, owners []flow.Owner) {
	now := time.Now()
	want := map[uint32][]int{}
	for i, f := range flows {
		o, found, err := p.diag.Owner(uint8(f.Proto), f.Src, f.Dst)
		if err != nil || !found {
			continue
		}
		owners[i] = flow.Owner{Known: true, UID: o.UID, Cgroup: p.cgroup(o.Cgroup)}
		if h, ok := p.sockets[o.Inode]; ok && now.Sub(h.at) < holderAge {
			owners[i].PID, owners[i].Exe = h.pid, h.exe
			continue
		}
		want[o.Inode] = append(want[o.Inode], i)
	}
	p.find(want, func(inode uint32, pid string) {
		h := holder{exe: ExeOf(pid), at: now}
		h.pid, _ = strconv.Atoi(pid)
		if len(p.sockets) >= maxHolders {
			clear(p.sockets)
		}
		p.sockets[inode] = h
		for _, i := range want[inode] {
			owners[i].PID, owners[i].Exe = h.pid, h.exe
			if owners[i].Cgroup == "" {
				owners[i].Cgroup = cgroupOf(pid)
			}
		}
	})
}

// find calls found once for each socket of want that a process has open.
func (p *Finder) find(want map[uint32][]int, found func(inode uint32, pid string)) {
	left := len(want)
	if left == 0 {
		return
	}
	have := make(map[uint32]bool, left)
	look := func(pid string) {
		sockets(pid, func(inode uint32) bool {
			if _, ok := want[inode]; ok && !have[inode] {
				have[inode] = true
				left--
				found(inode, pid)
				p.saw(pid)
			}
			return left > 0
		})
	}
	before := slices.Clone(p.recent)
	for _, pid := range before {
		if look(pid); left == 0 {
			return
		}
	}
	for _, pid := range lightFirst(processes(), openFiles) {
		if slices.Contains(before, pid) {
			continue
		}
		if look(pid); left == 0 {
			return
		}
	}
}

// saw moves a process to the front of those that recently had sockets.
func (p *Finder) saw(pid string) {
	if len(p.recent) > 0 && p.recent[0] == pid {
		return
	}
	p.recent = slices.DeleteFunc(p.recent, func(q string) bool { return q == pid })
	p.recent = slices.Insert(p.recent, 0, pid)
	p.recent = p.recent[:min(len(p.recent), maxRecent)]
}

// cgroup returns the path of a control group; "": unknown.
func (p *Finder) cgroup(inode uint64) string {
	if inode == 0 {
		return ""
	}
	path, ok := p.cgroups[inode]
	if !ok {
		if len(p.cgroups) >= maxCgroupPaths {
			clear(p.cgroups)
		}
		path, _ = kernel.CgroupPath(inode)
		p.cgroups[inode] = path
	}
	return path
}

// cgroupOf returns the control group of a process, for kernels that do not report that of a socket.
func cgroupOf(pid string) string {
	b, err := os.ReadFile(filepath.Join("/proc", pid, "cgroup"))
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(b)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::/"); ok {
			return path
		}
	}
	return ""
}

// sockets calls visit with the inode of each socket that a process has open, until it returns false.
func sockets(pid string, visit func(inode uint32) bool) {
	dir := filepath.Join("/proc", pid, "fd")
	d, err := os.Open(dir)
	if err != nil {
		return
	}
	defer d.Close()
	for {
		names, err := d.Readdirnames(256)
		for _, name := range names {
			link, err := os.Readlink(dir + "/" + name)
			if err != nil {
				continue
			}
			digits, ok := strings.CutPrefix(link, "socket:[")
			if !ok {
				continue
			}
			inode, err := strconv.ParseUint(strings.TrimSuffix(digits, "]"), 10, 32)
			if err == nil && !visit(uint32(inode)) {
				return
			}
		}
		if err != nil {
			return
		}
	}
}
