import {
  PolicyAuthorize,
  PolicyAuthValue,
  PolicyCommandCode,
  PolicyCounterTimer,
  PolicyCpHash,
  PolicyDuplicationSelect,
  PolicyGetDigest,
  PolicyLocality,
  PolicyNameHash,
  PolicyNV,
  PolicyNvWritten,
  PolicyOR,
  PolicyPassword,
  PolicyPCR,
  PolicyRestart,
  PolicySecret,
  PolicySigned,
  PolicyTemplate,
  PolicyTicket,
  VerifySignature,
} from './commands/index.js';
import { digest, requireHash } from './crypto.js';
import { TpmError } from './error.js';
import { loadPublic, whileLoaded } from './objects.js';
import { branchDigests, foldPolicy, orLevels } from './policy-digest.js';
import type { PolicyStep } from './policy-step.js';
import { signedPolicyMessage } from './policy-step.js';
import type { Session } from './session.js';
import type { Tpm } from './tpm.js';

const NOTHING = Buffer.alloc(0);

/**
 * Brings a policy session to the state that satisfies `steps`, from the beginning.
 * @returns the same steps, with a ticket in place of each authorisation that the TPM gave one for: while it is valid,
 * they satisfy the same policy without asking again
 * @throws TpmError
 */
export async function runPolicy(
  tpm: Tpm,
  session: Session,
  steps: readonly PolicyStep[],
): Promise<PolicyStep[]> {
  await tpm.run(PolicyRestart, { policySession: session }, {});
  return runSteps({ tpm, session }, () => Buffer.alloc(session.hash.size), steps);
}

interface Run {
  readonly tpm: Tpm;
  readonly session: Session;
}

/** @param from the digest before the first step, asked for only where a step needs it: not all are known offline */
async function runSteps(run: Run, from: () => Buffer, steps: readonly PolicyStep[]): Promise<PolicyStep[]> {
  const done: PolicyStep[] = [];
  for (const [at, step] of steps.entries()) {
    done.push(await runStep(run, () => foldPolicy(run.session.hash, from, steps.slice(0, at)), step));
  }
  return done;
}

/** @param before the digest so far */
async function runStep({ tpm, session }: Run, before: () => Buffer, step: PolicyStep): Promise<PolicyStep> {
  const policySession = session;
  const on = { policySession };
  switch (step.assert) {
    case 'pcr':
      // Without a digest the TPM takes the current values and refuses at the use.
      await tpm.run(PolicyPCR, on, { pcrDigest: NOTHING, pcrs: step.selection });
      return step;
    case 'command-code':
      await tpm.run(PolicyCommandCode, on, { code: step.code });
      return step;
    case 'auth-value':
      await tpm.run(PolicyAuthValue, on, {});
      return step;
    case 'password':
      await tpm.run(PolicyPassword, on, {});
      return step;
    case 'locality':
      await tpm.run(PolicyLocality, on, { locality: step.locality });
      return step;
    case 'nv-written':
      await tpm.run(PolicyNvWritten, on, { writtenSet: step.written });
      return step;
    case 'cp-hash':
      await tpm.run(PolicyCpHash, on, { cpHashA: step.cpHash });
      return step;
    case 'name-hash':
      await tpm.run(PolicyNameHash, on, { nameHash: step.nameHash });
      return step;
    case 'template':
      await tpm.run(PolicyTemplate, on, { templateHash: step.templateHash });
      return step;
    case 'duplication-select':
      await tpm.run(PolicyDuplicationSelect, on, {
        objectName: step.objectName ?? NOTHING,
        newParentName: step.newParentName,
        includeObject: step.includeObject,
      });
      return step;
    case 'counter-timer':
      await tpm.run(PolicyCounterTimer, on, {
        operandB: step.operand,
        offset: step.offset,
        operation: step.operation,
      });
      return step;
    case 'nv':
      await tpm.run(
        PolicyNV,
        { authHandle: step.by, nvIndex: step.index, policySession },
        { operandB: step.operand, offset: step.offset ?? 0, operation: step.operation },
      );
      return step;
    case 'secret':
      return runSecret({ tpm, session }, step);
    case 'signed':
      return runSigned({ tpm, session }, step);
    case 'ticket':
      await tpm.run(PolicyTicket, on, {
        timeout: step.timeout,
        cpHashA: step.cpHash ?? NOTHING,
        policyRef: step.policyRef ?? NOTHING,
        authName: step.name,
        ticket: step.ticket,
      });
      return step;
    case 'or':
      return runOr({ tpm, session }, before, step);
    case 'authorize':
      return runAuthorize({ tpm, session }, before, step);
  }
}

async function runSecret({ tpm, session }: Run, step: PolicyStep<'secret'>): Promise<PolicyStep> {
  const expiration = step.expiration ?? 0;
  const { timeout, policyTicket } = await tpm.run(
    PolicySecret,
    { authHandle: step.of, policySession: session },
    {
      // A time limit runs from the session's start, and only the nonce says which session.
      nonceTPM: expiration === 0 ? NOTHING : session.nonceTpm,
      cpHashA: step.cpHash ?? NOTHING,
      policyRef: step.policyRef ?? NOTHING,
      expiration,
    },
  );
  const { name } = step.of.entity;
  if (timeout.length === 0 || policyTicket.digest.length === 0 || name === undefined) return step;
  return ticketStep(step, { name, timeout, ticket: policyTicket });
}

async function runSigned({ tpm, session }: Run, step: PolicyStep<'signed'>): Promise<PolicyStep> {
  const nonceTPM = session.nonceTpm;
  const auth = await step.sign(signedPolicyMessage(step, nonceTPM));
  return whileLoaded(tpm, loadPublic(tpm, step.signer), async (authObject) => {
    const { timeout, policyTicket } = await tpm.run(
      PolicySigned,
      { authObject, policySession: session },
      {
        nonceTPM,
        cpHashA: step.cpHash ?? NOTHING,
        policyRef: step.policyRef ?? NOTHING,
        expiration: step.expiration ?? 0,
        auth,
      },
    );
    if (timeout.length === 0 || policyTicket.digest.length === 0) return step;
    return ticketStep(step, { name: authObject.name, timeout, ticket: policyTicket });
  });
}

function ticketStep(
  step: PolicyStep<'secret'> | PolicyStep<'signed'>,
  got: Pick<PolicyStep<'ticket'>, 'name' | 'timeout' | 'ticket'>,
): PolicyStep<'ticket'> {
  return {
    assert: 'ticket',
    ...got,
    ...(step.policyRef === undefined ? {} : { policyRef: step.policyRef }),
    ...(step.cpHash === undefined ? {} : { cpHash: step.cpHash }),
  };
}

async function runOr(run: Run, before: () => Buffer, step: PolicyStep<'or'>): Promise<PolicyStep> {
  const branch = step.branches[step.take ?? -1];
  if (branch === undefined || branch instanceof Uint8Array || step.take === undefined) {
    throw new TpmError('usage', 'which branch of the policy is to be satisfied was not said, or its steps');
  }
  const from = before();
  const digests = branchDigests(run.session.hash, from, step.branches);
  const done = await runSteps(run, () => from, branch);
  // From the group of the branch to the one that holds all.
  let at = step.take;
  for (const groups of orLevels(run.session.hash, digests)) {
    at = groups.findIndex(({ members }) => members.includes(at));
    const group = groups[at];
    if (group !== undefined && group.digests.length > 1) {
      await run.tpm.run(PolicyOR, { policySession: run.session }, { pHashList: group.digests });
    }
  }
  return { ...step, branches: step.branches.with(step.take, done) };
}

async function runAuthorize(
  run: Run,
  before: () => Buffer,
  step: PolicyStep<'authorize'>,
): Promise<PolicyStep> {
  const { tpm, session } = run;
  const { approved, signer } = step;
  if (approved === undefined)
    throw new TpmError('usage', 'a policy that the key approved is needed to use it');
  // What came before in the list is part of what has to be approved.
  const done = await runSteps(run, before, approved.policy);
  const { policyDigest: approvedPolicy } = await tpm.run(PolicyGetDigest, { policySession: session }, {});
  const policyRef = step.policyRef ?? NOTHING;
  await whileLoaded(tpm, loadPublic(tpm, signer), async (keyHandle) => {
    const aHash = digest(requireHash(signer.value.nameAlg), approvedPolicy, policyRef);
    const { validation } = await tpm.run(
      VerifySignature,
      { keyHandle },
      { digest: aHash, signature: approved.signature },
    );
    await tpm.run(
      PolicyAuthorize,
      { policySession: session },
      { approvedPolicy, policyRef, keySign: keyHandle.name, checkTicket: validation },
    );
  });
  return { ...step, approved: { ...approved, policy: done } };
}
