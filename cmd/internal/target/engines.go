package target

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// maxState is the largest size of an engine's state file, in bytes. The files of docker and containerd contain the environment
// of the container and have some ten kilobytes.
const maxState = 4 << 20

// The names of containers are found without asking their engines:
//
//   - podman and CRI-O start a conmon for each container, which has the id and the name among its arguments, and is the
//     parent of the container's first process.
//   - docker and containerd start a containerd-shim, whose working directory is the bundle of a container. The bundles of
//     the other containers of its pod are beside it. The annotations in a bundle's config.json contain the names of
//     Kubernetes. Its mounts contain docker's directory of containers, where a file has docker's name. The id of ctr's
//     containers is a name, and that of their bundle; the file init.pid in it has the id of the first process.
//   - systemd-machined has a file for each machine of systemd-nspawn that it knows in /run/systemd/machines. Each machine
//     has a directory with its name mounted, and systemd-nspawn is the parent of its first process.
//   - LXC has the name in the title of its monitor and in the control group, which ends in a number if another control
//     group had the name before.

// monitor returns the id and the name of a container from the arguments of its conmon. ok is false if cmdline does not belong
// to a conmon.
func monitor(cmdline []byte) (id, name string, ok bool) {
	args := strings.Split(strings.TrimRight(string(cmdline), "\x00"), "\x00")
	if filepath.Base(args[0]) != "conmon" {
		return "", "", false
	}
	for i := 1; i < len(args); i++ {
		flag, value, joined := strings.Cut(args[i], "=")
		if !joined && i+1 < len(args) {
			value = args[i+1]
		}
		switch flag {
		case "-c", "--cid":
			id = value
		case "-n", "--name":
			name = value
		case "--exit-command-arg", "--runtime-arg": // the value is an argument of another program
		default:
			continue
		}
		if !joined {
			i++
		}
	}
	return id, name, idRE.MatchString(id) && nameRE.MatchString(name)
}

// kubernetes returns the names of a container of a pod: its own, the pod's, and the pod's with that of its namespace.
func kubernetes(container, pod, namespace string) []string {
	var names []string
	if container != "" && container != "POD" { // POD is the container that holds the pod's network
		names = append(names, container)
	}
	if pod != "" {
		names = append(names, pod)
		if namespace != "" {
			names = append(names, namespace+"/"+pod)
		}
	}
	return slices.DeleteFunc(names, func(n string) bool { return !nameRE.MatchString(n) })
}

// namesOf returns the names that a name of CRI-O or docker stands for: the name itself and, if it has the form
// k8s_CONTAINER_POD_NAMESPACE_UID_TRY, those of Kubernetes.
func namesOf(name string) []string {
	if f := strings.Split(name, "_"); len(f) >= 6 && f[0] == "k8s" {
		return append(kubernetes(f[1], f[2], f[3]), name)
	}
	if !nameRE.MatchString(name) {
		return nil
	}
	return []string{name}
}

// bundle has the parts of a bundle's config.json that matter here (opencontainers/runtime-spec).
type bundle struct {
	Annotations map[string]string
	Mounts      []struct{ Source string }
}

// names returns the names in the annotations of containerd's CRI plugin, of CRI-O and of nerdctl.
func (b *bundle) names() []string {
	var names []string
	for _, k := range [][3]string{
		{"io.kubernetes.cri.container-name", "io.kubernetes.cri.sandbox-name", "io.kubernetes.cri.sandbox-namespace"},
		{"io.kubernetes.container.name", "io.kubernetes.pod.name", "io.kubernetes.pod.namespace"},
	} {
		names = append(names, kubernetes(b.Annotations[k[0]], b.Annotations[k[1]], b.Annotations[k[2]])...)
	}
	return append(names, namesOf(b.Annotations["nerdctl/name"])...)
}

// dockerDir returns docker's directory of containers, from which docker mounts files into each container.
func (b *bundle) dockerDir() (dir string, ok bool) {
	for _, m := range b.Mounts {
		own := filepath.Dir(m.Source)
		if dir = filepath.Dir(own); filepath.Base(dir) == "containers" && idRE.MatchString(filepath.Base(own)) {
			return dir, true
		}
	}
	return "", false
}

// isShim reports whether a process is a containerd-shim that is believed.
func (s *system) isShim(p *running) bool {
	return strings.HasPrefix(p.comm, "containerd-shim") && p.id == "" && s.trusts(p.uid)
}

// cwd is the working directory of a process.
func (s *system) cwd(p *running) (string, error) {
	return os.Readlink(filepath.Join(s.proc, strconv.Itoa(p.pid), "cwd"))
}

// addNamed adds the container of a containerd-shim whose id is not that of a control group, as ctr's are, if p is its first
// process.
func (s *system) addNamed(found map[key]*container, shim, p *running) {
	dir, err := s.cwd(shim)
	if err != nil {
		s.miss(err)
		return
	}
	bundles, err := filepath.Glob(filepath.Join(filepath.Dir(dir), "*"))
	if err != nil {
		return
	}
	for _, dir := range bundles {
		text, err := s.readState(filepath.Join(dir, "init.pid"), maxStat)
		if err != nil || strings.TrimSpace(string(text)) != strconv.Itoa(p.pid) {
			continue
		}
		id := filepath.Base(dir)
		if !nameRE.MatchString(id) {
			return
		}
		if idRE.MatchString(id) {
			s.add(found, id, p)
			return
		}
		c := s.add(found, filepath.Base(filepath.Dir(dir))+"/"+id, p)
		c.engine, c.names = s.shimmed(id, shim)
		c.names = append(c.names, id)
	}
}

// shimmed returns the engine and the names of the container id if shim, the parent of its first process, is a containerd-shim.
func (s *system) shimmed(id string, shim *running) (engine string, names []string) {
	if !s.isShim(shim) {
		return "", nil
	}
	engine = "containerd"
	dir, err := s.cwd(shim)
	if err != nil {
		s.miss(err)
		return engine, nil
	}
	var b bundle
	text, err := s.readState(filepath.Join(filepath.Dir(dir), id, "config.json"), maxState)
	if err == nil {
		err = json.Unmarshal(text, &b)
	}
	if err != nil {
		s.miss(err)
		return engine, nil
	}
	if where, ok := b.dockerDir(); ok {
		return "docker", s.dockerNames(where, id)
	}
	return engine, b.names()
}

// dockerNames returns the names of a container from docker's directory of containers.
func (s *system) dockerNames(dir, id string) []string {
	var c struct{ ID, Name string }
	text, err := s.readState(filepath.Join(dir, id, "config.v2.json"), maxState)
	if err == nil {
		err = json.Unmarshal(text, &c)
	}
	if err != nil {
		s.miss(err)
		return nil
	}
	if c.ID != id {
		return nil
	}
	return namesOf(strings.TrimPrefix(c.Name, "/"))
}

// machine returns the first process of a machine of systemd, or nil if no such machine runs.
func (s *system) machine(name string, all map[int]*running) *running {
	if strings.Contains(name, "/") {
		return nil
	}
	text, err := s.readState(filepath.Join(s.machines, name), maxStat)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			s.miss(err)
		}
		return nil
	}
	var leader int
	var unit string
	for line := range strings.Lines(string(text)) {
		switch k, v, _ := strings.Cut(strings.TrimSpace(line), "="); k {
		case "LEADER":
			leader, _ = strconv.Atoi(v)
		case "SCOPE": // also where the unit is a service
			unit = v
		}
	}
	p := all[leader]
	if p == nil || !s.inUnit(leader, unit) {
		return nil // it has ended, and another process may have its id
	}
	return p
}

// inUnit reports whether a process is in the control group of a unit of systemd.
func (s *system) inUnit(pid int, unit string) bool {
	b, err := readSome(filepath.Join(s.proc, strconv.Itoa(pid), "cgroup"), maxCgroup)
	return err == nil && unit != "" && slices.Contains(strings.FieldsFunc(string(b), func(r rune) bool {
		return r == '/' || r == '\n'
	}), unit)
}

// machineOf is the container of a machine of systemd.
func (s *system) machineOf(name string, first *running) *container {
	n := s.network(first.pid)
	return &container{key{"", n.owner, n.own}, "systemd-nspawn", []string{name}, first, n}
}

// mountedName returns the name of the machine that a process is in, from the directory by which the host gives it mounts; "":
// it has none.
func (s *system) mountedName(pid int) string {
	b, err := readSome(filepath.Join(s.proc, strconv.Itoa(pid), "mountinfo"), maxMounts)
	if err != nil {
		s.miss(err)
		return ""
	}
	for line := range strings.Lines(string(b)) {
		const root = 3 // proc_pid_mountinfo(5) counts from 1: the directory of the file system that is mounted
		f := strings.Fields(line)
		if len(f) <= root {
			continue
		}
		if _, name, ok := strings.Cut(f[root], "/systemd/nspawn/propagate/"); ok && nameRE.MatchString(name) {
			return name
		}
	}
	return ""
}

// lxcMonitor is the title of the monitor of an LXC container, which ends in the path of all of them and its name.
const lxcMonitor = "[lxc monitor] "

// lxcNames returns the name of an LXC container, from its control group and the process that started it.
func (s *system) lxcNames(group string, monitor *running) []string {
	name := strings.TrimPrefix(group, lxcPayload)
	if monitor == nil {
		return []string{name}
	}
	b, _ := readSome(filepath.Join(s.proc, strconv.Itoa(monitor.pid), "cmdline"), maxCmdline)
	text := strings.TrimRight(string(b), "\x00")
	args := strings.Split(text, "\x00")
	if title, ok := strings.CutPrefix(text, lxcMonitor); ok {
		args = []string{title[strings.LastIndexByte(title, ' ')+1:]}
	}
	return []string{lxcName(name, args)}
}

// lxcName returns the name that an LXC container has if its control group has this one: the control group of web is that of
// web-1 where there is another one. The arguments of lxc-start tell.
func lxcName(group string, args []string) string {
	name := group
	for _, arg := range args {
		if arg == "--" { // a program of the container follows
			break
		}
		arg = strings.TrimPrefix(strings.TrimPrefix(arg, "--name="), "-n")
		if arg == group {
			return group
		}
		if n, ok := strings.CutPrefix(group, arg+"-"); ok && arg != "" {
			if _, err := strconv.ParseUint(n, 10, 32); err == nil {
				name = arg
			}
		}
	}
	return name
}

// addLXC adds the container of a monitor whose control group has no name of LXC, because lxc.cgroup.dir.container says so.
func (s *system) addLXC(found map[key]*container, all map[int]*running, monitor *running) {
	b, _ := readSome(filepath.Join(s.proc, strconv.Itoa(monitor.pid), "cmdline"), maxCmdline)
	title, ok := strings.CutPrefix(strings.TrimRight(string(b), "\x00"), lxcMonitor)
	name := title[strings.LastIndexByte(title, ' ')+1:]
	if !ok || !nameRE.MatchString(name) {
		return
	}
	for _, p := range all {
		if p.parent == monitor.pid && p.id == "" {
			c := s.add(found, lxcPayload+name, p)
			c.engine, c.names = "LXC", []string{name}
		}
	}
}
