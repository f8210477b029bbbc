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

// maxState limits a state file of an engine. docker's and containerd's have the environment of a container, too, and take
// some ten kilobytes; the machines of systemd take a few lines.
const maxState = 4 << 20

// The names that engines keep for their containers are found without asking the engine:
//
//   - podman and CRI-O start a conmon for each container, which has the id and the name among its arguments, and is the
//     parent of the container's first process.
//   - docker and containerd start a containerd-shim, whose working directory is the bundle of a container; those of
//     the other containers of its pod are beside it. The bundle's config.json has Kubernetes' names among its
//     annotations, and docker's directory of containers among its mounts, which has a file with the name.
//   - systemd-nspawn's machines are files in /run/systemd/machines.
//   - LXC has the name in the control group.

// monitor gives the name of a container from the arguments of its conmon; ok: they are those of one.
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
	if container != "" && container != "POD" { // the latter holds the network of all others
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

// namesOf returns the name that CRI-O and docker have, and those of Kubernetes in it: k8s_CONTAINER_POD_NAMESPACE_UID_TRY.
func namesOf(name string) []string {
	if f := strings.Split(name, "_"); len(f) >= 6 && f[0] == "k8s" {
		return append(kubernetes(f[1], f[2], f[3]), name)
	}
	if !nameRE.MatchString(name) {
		return nil
	}
	return []string{name}
}

// bundle is what matters of the config.json of a bundle (opencontainers/runtime-spec).
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

// dockerDir returns the directory of docker's containers, from which each has files in its mounts.
func (b *bundle) dockerDir() (dir string, ok bool) {
	for _, m := range b.Mounts {
		own := filepath.Dir(m.Source)
		if dir = filepath.Dir(own); filepath.Base(dir) == "containers" && idRE.MatchString(filepath.Base(own)) {
			return dir, true
		}
	}
	return "", false
}

// shimmed returns the engine and the names of a container whose first process was started by a containerd-shim.
func (s *system) shimmed(id string, shim *running) (engine string, names []string) {
	if !strings.HasPrefix(shim.comm, "containerd-shim") || shim.id != "" || !s.trusts(shim.uid) {
		return "", nil
	}
	engine = "containerd"
	dir, err := os.Readlink(filepath.Join(s.proc, strconv.Itoa(shim.pid), "cwd"))
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

// dockerNames returns what docker calls a container.
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

// machine returns the first process of a machine of systemd; nil: there is none.
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
		case "UNIT":
			unit = v
		}
	}
	p := all[leader]
	if p == nil || !s.inUnit(leader, unit) {
		return nil // it has ended, and another one may have its number
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
