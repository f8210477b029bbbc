package target

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
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

// containers returns the lowest process id of each container on this host, by its id. proc is /proc.
func containers(proc string) map[string]int {
	found := map[string]int{}
	files, _ := filepath.Glob(filepath.Join(proc, "[0-9]*/cgroup"))
	for _, file := range files {
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil {
			continue
		}
		b, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		for line := range strings.Lines(string(b)) {
			fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
			if len(fields) < 3 {
				continue
			}
			if id := containerOf(fields[2]); id != "" && (found[id] == 0 || pid < found[id]) {
				found[id] = pid
			}
		}
	}
	return found
}

// maxCandidates is how many containers an error names.
const maxCandidates = 8

// processOf returns a process of the container whose id begins with want, or whose name is want.
func processOf(want string, all map[string]int) (pid int, err error) {
	if pid = all[want]; pid != 0 {
		return pid, nil
	}
	var ids []string
	for id := range all {
		if strings.HasPrefix(id, want) {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	switch {
	case len(ids) == 1:
		return all[ids[0]], nil
	case len(ids) > 1:
		more := ""
		if len(ids) > maxCandidates {
			ids, more = ids[:maxCandidates], " and others"
		}
		return 0, fmt.Errorf("several have an id that begins so: %s%s", strings.Join(ids, ", "), more)
	}
	return 0, errors.New("no running container has an id that begins so: names of docker and podman can't be looked up: " +
		"'docker ps --no-trunc' or 'podman ps --no-trunc' shows the ids")
}

// ofContainer opens the network namespace of a container.
func ofContainer(want string) (Target, error) {
	pid, err := processOf(want, containers("/proc"))
	if err != nil {
		return Target{}, fmt.Errorf("cannot use the container %s: %w", want, err)
	}
	return open(fmt.Sprintf("/proc/%d/ns/net", pid), "container "+want)
}
