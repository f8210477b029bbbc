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

// lxcPayload precedes the name in the control group of an LXC container. liblxc 4 and later write lxc.payload.NAME, and
// NAME-1 if that is there already; earlier ones wrote lxc/NAME. Incus and LXD have the former.
const lxcPayload = "lxc.payload."

// containerOf returns the id of the container of a process from a path in /proc/PID/cgroup; "": there is none. That of an LXC
// container is the name of its control group.
// The names that engines give to control groups are, by systemd and without:
//
//	docker-ID.scope, libpod-ID.scope, crio-ID.scope, cri-containerd-ID.scope
//	/docker/ID, /libpod_parent/libpod-ID, /kubepods/burstable/podUID/ID
//	lxc.payload.NAME
//
// Programs below the container's own control group belong to it, too.
func containerOf(path string) (id string) {
	for part := range strings.SplitSeq(path, "/") {
		if len(part) > len(lxcPayload) && strings.HasPrefix(part, lxcPayload) {
			id = part
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

// How many bytes of each file of a process are read at most. The owner of the process may be anybody.
const (
	maxStat    = 4 << 10
	maxCgroup  = 64 << 10
	maxCmdline = 64 << 10
	maxMounts  = 4 << 20
)

// running is a process as /proc shows it.
type running struct {
	pid, parent int
	comm        string
	start       uint64 // when it was started, in clock ticks since the boot
	uid         int    // owner of its directory in /proc; -1: unknown
	id          string // id of its container; "": its control group names none
}

// inLXC reports whether a process is in a container of LXC, by its control group.
func (p *running) inLXC() bool { return strings.HasPrefix(p.id, lxcPayload) }

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

// readProcess reads the state of a process from its directory in /proc. It returns nil if the process has ended.
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
			p.id = id
		}
	}
	return p
}

// parseStat parses the content of /proc/PID/stat. The name of the program in it may contain anything, even parentheses.
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

// before reports whether p was started before other. The engine has started the first process of a container.
func (p *running) before(other *running) bool {
	return p.start < other.start || p.start == other.start && p.pid < other.pid
}
