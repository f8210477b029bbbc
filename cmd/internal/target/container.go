package target

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
)

// idRE is the id of a container: 64 hexadecimal digits in docker, podman, containerd and cri-o.
var idRE = regexp.MustCompile(`^[0-9a-f]{64}$`)

// lxcRE is the control group of an LXC container, which has its name. liblxc 4 and later write lxc.payload.NAME, earlier
// ones lxc/NAME, Incus and LXD the former.
var lxcRE = regexp.MustCompile(`^lxc\.payload\.(.+)$`)

// containerOf returns the id or name of the container of a process from a path in /proc/PID/cgroup; "": there is none.
// The names that engines give to control groups are, by systemd and without:
//
//	docker-ID.scope, libpod-ID.scope, crio-ID.scope, cri-containerd-ID.scope
//	/docker/ID, /libpod_parent/libpod-ID, /kubepods/burstable/podUID/ID
//	lxc.payload.NAME
//
// Programs below the container's own control group belong to it, too.
func containerOf(path string) (id string) {
	for part := range strings.SplitSeq(path, "/") {
		if m := lxcRE.FindStringSubmatch(part); m != nil {
			id = m[1]
			continue
		}
		name := strings.TrimSuffix(part, ".scope")
		if strings.HasSuffix(name, ".slice") || strings.HasPrefix(name, "libpod-conmon-") ||
			strings.HasPrefix(name, "crio-conmon-") {
			continue // of a monitor on the host
		}
		if last := name[strings.LastIndexAny(name, "-:")+1:]; idRE.MatchString(last) {
			id = last
		}
	}
	return id
}

// Limits of what is read of a process, whose owner may be anybody.
const (
	maxStat    = 4 << 10
	maxCgroup  = 64 << 10
	maxCmdline = 64 << 10
)

// A running is a process, as /proc shows it.
type running struct {
	pid, parent int
	comm        string
	start       uint64 // time of its start, in clock ticks since the boot
	uid         int    // its owner, as of the directory in /proc
	id          string // of its container; "": it is in none
	lxc         bool   // id is a name, and of LXC
}

// processes returns all processes whose state can be read.
func (s *system) processes() map[int]*running {
	all := map[int]*running{}
	files, _ := filepath.Glob(filepath.Join(s.proc, "[0-9]*"))
	for _, dir := range files {
		if p := readProcess(dir); p != nil {
			all[p.pid] = p
		}
	}
	return all
}

// readProcess returns nil if the process has ended.
func readProcess(dir string) *running {
	pid, err := strconv.Atoi(filepath.Base(dir))
	if err != nil {
		return nil
	}
	p := &running{pid: pid, uid: -1}
	if i, err := os.Stat(dir); err != nil {
		return nil
	} else if st, ok := i.Sys().(*syscall.Stat_t); ok {
		p.uid = int(st.Uid)
	}
	b, err := readSome(filepath.Join(dir, "stat"), maxStat)
	if err != nil || !p.parseStat(b) {
		return nil
	}
	if b, err = readSome(filepath.Join(dir, "cgroup"), maxCgroup); err != nil {
		return nil
	}
	for line := range strings.Lines(string(b)) {
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(fields) < 3 {
			continue
		}
		if id := containerOf(fields[2]); id != "" {
			p.id, p.lxc = id, !idRE.MatchString(id)
		}
	}
	return p
}

// parseStat reads /proc/PID/stat. The name in it may contain anything, also brackets.
func (p *running) parseStat(b []byte) bool {
	from, to := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	if from < 0 || to < from {
		return false
	}
	p.comm = string(b[from+1 : to])
	f := strings.Fields(string(b[to+1:]))
	const parent, start = 4 - 3, 22 - 3 // proc(5) counts from 1, and the state is its third field
	if len(f) <= start {
		return false
	}
	var err1, err2 error
	p.parent, err1 = strconv.Atoi(f[parent])
	p.start, err2 = strconv.ParseUint(f[start], 10, 64)
	return err1 == nil && err2 == nil
}

// before reports whether p was started before other. The first process of a container is the one that its engine started.
func (p *running) before(other *running) bool {
	return p.start < other.start || p.start == other.start && p.pid < other.pid
}
