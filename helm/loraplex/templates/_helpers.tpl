{{- define "loraplex.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "loraplex.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else if contains (include "loraplex.name" .) .Release.Name }}
{{- .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "loraplex.name" .) | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- /* Labels that a selector may use. Call with (dict "root" $ "component" "server"). */ -}}
{{- define "loraplex.selector" -}}
app.kubernetes.io/name: {{ include "loraplex.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "loraplex.labels" -}}
{{ include "loraplex.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "loraplex.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "loraplex.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "loraplex.tag" -}}
{{- .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "loraplex.cacheClaim" -}}
{{- .Values.model.cache.existingClaim | default (printf "%s-cache" (include "loraplex.fullname" .)) }}
{{- end }}

{{- /* Whether the registry keeps something of its own: "yes", or nothing with a database and an object store. */ -}}
{{- define "loraplex.registryVolume" -}}
{{- if not (and .Values.registry.database.existingSecret .Values.registry.store.url) -}}
yes
{{- end }}
{{- end }}

{{- define "loraplex.registryUrl" -}}
{{- if .Values.registry.enabled -}}
http://{{ include "loraplex.fullname" . }}-registry:{{ .Values.registry.port }}
{{- else -}}
{{ .Values.registry.externalUrl }}
{{- end }}
{{- end }}

{{- /* What every pod of the release has in common: the restricted pod security standard, and no way into the API. Service
links are off also because a service called "loraplex" would set LORAPLEX_PORT, which is an option of the server. */ -}}
{{- define "loraplex.podBasics" -}}
serviceAccountName: {{ include "loraplex.serviceAccount" . }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{- /* How long the server may let requests finish: what the grace period leaves after the preStop sleep, and 10 s to end
in. After that Kubernetes kills it. */ -}}
{{- define "loraplex.drainSeconds" -}}
{{- $drain := .Values.server.drain }}
{{- max 1 (sub (int $drain.gracePeriodSeconds) (add (int $drain.preStopSeconds) 10)) }}
{{- end }}

{{- /* Where the registry's catalog is, for each container that opens it. */ -}}
{{- define "loraplex.registryDatabase" -}}
{{- with .Values.registry.database }}
{{- if .existingSecret -}}
- name: LORAPLEX_REGISTRY_DATABASE
  valueFrom: {secretKeyRef: {name: {{ .existingSecret }}, key: {{ .key }}}}
{{- end }}
{{- end }}
{{- end }}

{{- define "loraplex.containerSecurity" -}}
allowPrivilegeEscalation: false
privileged: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
{{- end }}

{{- /* Values that contradict each other: said here, in words, before anything is made. */ -}}
{{- define "loraplex.check" -}}
{{- $cache := .Values.model.cache }}
{{- $several := or (gt (int .Values.server.replicas) 1) (eq .Values.autoscaling.type "hpa") }}
{{- if and .Values.registry.enabled .Values.registry.externalUrl }}
{{- fail "registry.externalUrl is set while registry.enabled is true: set registry.enabled=false to use another registry" }}
{{- end }}
{{- if not (or .Values.registry.enabled .Values.registry.externalUrl) }}
{{- fail "registry.enabled is false and registry.externalUrl is empty: name the registry to use in registry.externalUrl" }}
{{- end }}
{{- if and .Values.registry.enabled .Values.registry.tokens.existingSecret (not .Values.registry.serverToken.existingSecret) }}
{{- fail "registry.tokens.existingSecret is set and registry.serverToken.existingSecret is empty: the servers need one of the tokens to read" }}
{{- end }}
{{- if and (gt (int .Values.registry.replicas) 1) (include "loraplex.registryVolume" .) }}
{{- fail "registry.replicas is more than 1: set registry.database.existingSecret and registry.store.url, which several registries can share" }}
{{- end }}
{{- if and .Values.registry.store.existingSecret (not .Values.registry.store.url) }}
{{- fail "registry.store.existingSecret is set and registry.store.url is empty: name the store, as s3://bucket/prefix" }}
{{- end }}
{{- if and .Values.registry.database.upgrade (not .Values.registry.database.existingSecret) }}
{{- fail "registry.database.upgrade is true and registry.database.existingSecret is empty: it is for a catalog in PostgreSQL" }}
{{- end }}
{{- if and .Values.server.requireSignature.existingSecret (not .Values.server.requireSignature.keys) }}
{{- fail "server.requireSignature.existingSecret is set and server.requireSignature.keys is empty: name the secret's keys that are public keys" }}
{{- end }}
{{- if and .Values.server.requireSignature.keys (not .Values.server.requireSignature.existingSecret) }}
{{- fail "server.requireSignature.keys is set and server.requireSignature.existingSecret is empty: name the secret that has them" }}
{{- end }}
{{- if and $cache.persistent $several (not $cache.existingClaim) (hasPrefix "ReadWriteOnce" $cache.accessMode) }}
{{- fail "model.cache.accessMode allows one node while several servers share the cache: set ReadWriteMany, or model.cache.persistent=false" }}
{{- end }}
{{- if and .Values.metrics.podMonitor.enabled .Values.metrics.serviceMonitor.enabled }}
{{- fail "metrics.podMonitor.enabled and metrics.serviceMonitor.enabled would scrape every server twice: enable one of them" }}
{{- end }}
{{- if gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas) }}
{{- fail "autoscaling.minReplicas is greater than autoscaling.maxReplicas" }}
{{- end }}
{{- if ge (int .Values.server.drain.preStopSeconds) (int .Values.server.drain.gracePeriodSeconds) }}
{{- fail "server.drain.preStopSeconds leaves nothing of server.drain.gracePeriodSeconds for streams to finish" }}
{{- end }}
{{- end }}
