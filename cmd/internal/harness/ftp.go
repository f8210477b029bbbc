package harness

import (
	"crypto/rand"
	"os"
	"path/filepath"
	"testing"
)

const ftpSize = 8 << 20

// FTPServer returns a configuration of vsftpd at address, and its directory, with the random content in "file" and a
// directory "up" that takes files. The server has no PASV, and in active FTP it connects only to the address that the control
// connection comes from.
func FTPServer(t testing.TB, address string) (conf, files string, content []byte) {
	t.Helper()
	dir := t.TempDir()
	for p := dir; p != os.TempDir() && p != "/"; p = filepath.Dir(p) { // vsftpd becomes another user
		if err := os.Chmod(p, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	files, empty, conf := filepath.Join(dir, "files"), filepath.Join(dir, "empty"), filepath.Join(dir, "vsftpd.conf")
	for _, d := range []string{files, empty, filepath.Join(files, "up")} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(filepath.Join(files, "up"), 0o777); err != nil {
		t.Fatal(err)
	}
	content = make([]byte, ftpSize)
	_, _ = rand.Read(content)
	if err := os.WriteFile(filepath.Join(files, "file"), content, 0o644); err != nil {
		t.Fatal(err)
	}
	// The user needs a home that exists.
	if err := os.WriteFile(conf, []byte(`listen=YES
listen_ipv6=NO
listen_address=`+address+`
background=NO
anonymous_enable=YES
local_enable=NO
write_enable=YES
anon_upload_enable=YES
anon_umask=022
chown_uploads=NO
ftp_username=daemon
nopriv_user=nobody
anon_root=`+files+`
no_anon_password=YES
pasv_enable=NO
port_promiscuous=NO
secure_chroot_dir=`+empty+`
seccomp_sandbox=NO
`), 0o600); err != nil {
		t.Fatal(err)
	}
	return conf, files, content
}
